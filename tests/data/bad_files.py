"""A hundred files that somebody could give as data, by name: mostly bad, each in a way of its own."""

import gzip
import json

GOOD = {"prompt": "the", "completion": "cat", "label": 1}
LINE = json.dumps(GOOD).encode() + b"\n"
PAIR = {"prompt": "the", "chosen": "cat", "rejected": "mat"}
STEPS = {"prompt": "the", "completions": ["cat", "sat"], "labels": [1, 0]}


def line(base: dict = GOOD, **changes) -> bytes:
    """A row with values replaced, or left out where the new one is ``...``."""
    row = {key: value for key, value in {**base, **changes}.items() if value is not ...}
    return json.dumps(row).encode() + b"\n"


def raw(text: str | bytes) -> bytes:
    """A good line, then this one."""
    return LINE + (text.encode() if isinstance(text, str) else text) + b"\n"


def of_label(text: str) -> bytes:
    """A good line, then one whose label is written like this."""
    return raw('{"prompt": "the", "completion": "cat", "label": ' + text + "}")


ENCODINGS = {
    "utf8_bom.jsonl": b"\xef\xbb\xbf" + LINE * 2,
    "utf16.jsonl": (LINE * 2).decode().encode("utf-16"),
    "utf16le_without_bom.jsonl": (LINE * 2).decode().encode("utf-16-le"),
    "utf32.jsonl": (LINE * 2).decode().encode("utf-32"),
    "latin1.jsonl": raw('{"prompt": "caf\u00e9", "completion": "a", "label": 1}'.encode("latin-1")),
    "cp1252_quotes.jsonl": raw('{"prompt": "\u201cQ\u201d", "completion": "a", "label": 1}'.encode("cp1252")),
    "shift_jis.jsonl": raw('{"prompt": "\u65e5\u672c", "completion": "a", "label": 1}'.encode("shift_jis")),
    "overlong_utf8.jsonl": raw(b'{"prompt": "\xc0\xaf", "completion": "a", "label": 1}'),
    "cut_utf8.jsonl": raw(b'{"prompt": "\xe2\x82", "completion": "a", "label": 1}'),
    "raw_surrogate.jsonl": raw(b'{"prompt": "\xed\xa0\x80", "completion": "a", "label": 1}'),
    "escaped_half_pair.jsonl": raw(r'{"prompt": "\ud83d", "completion": "a", "label": 1}'),
    "escaped_low_half.jsonl": raw(r'{"prompt": "the", "completion": "\ude00", "label": 1}'),
    "half_pair_in_a_key.jsonl": raw(r'{"prompt": "the", "completion": "a", "label": 1, "\ud800": 2}'),
    "newline_in_a_key.jsonl": raw(r'{"prompt": "the", "completion": "a", "label": 1, "a\nb": 2}'),
    "half_pair_in_an_only_key.jsonl": b'{"\\ud800": 2}\n',
    "newline_in_an_only_key.jsonl": b'{"a\\nb": 2}\n',
    "half_pair_in_problem_id.jsonl": raw(r'{"prompt": "a", "completion": "a", "label": 1, "problem_id": "\ud800"}'),
    "whole_pair.jsonl": raw(r'{"prompt": "\ud83d\ude00", "completion": "a", "label": 1}'),
    "nul_escaped.jsonl": raw(r'{"prompt": "a\u0000b", "completion": "a", "label": 1}'),
    "nul_raw.jsonl": raw(b'{"prompt": "a\x00b", "completion": "a", "label": 1}'),
    "nul_only.jsonl": b"\x00" * 64,
    "noncharacter.jsonl": raw('{"prompt": "a\ufdd0b", "completion": "a", "label": 1}'),
    "bom_inside.jsonl": LINE + b"\xef\xbb\xbf" + LINE,
    "controls.jsonl": raw(b'{"prompt": "a\x1b[31m", "completion": "a", "label": 1}'),
    "right_to_left.jsonl": line(prompt="\u202eabc\u202c"),
    "combining.jsonl": line(prompt="e" + "\u0301" * 500),
}
SHAPES = {
    "empty.jsonl": b"",
    "newlines.jsonl": b"\n\n\n",
    "spaces.json": b"   \t  ",
    "no_last_newline.jsonl": (LINE * 2).rstrip(b"\n"),
    "crlf.jsonl": LINE.replace(b"\n", b"\r\n") * 2,
    "old_mac.jsonl": LINE.replace(b"\n", b"\r") * 2,
    "cut_in_a_string.jsonl": raw('{"prompt": "the", "completion": "ca'),
    "cut_in_a_key.jsonl": raw('{"prompt": "the", "compl'),
    "cut_after_a_colon.jsonl": raw('{"prompt":'),
    "two_in_a_line.jsonl": raw('{"prompt": "a", "completion": "b", "label": 1} {"prompt": "c"}'),
    "trailing_comma.jsonl": raw('{"prompt": "a", "completion": "b", "label": 1,}'),
    "single_quotes.jsonl": raw("{'prompt': 'a', 'completion': 'b', 'label': 1}"),
    "python_true.jsonl": of_label("True"),
    "comment.jsonl": raw("// a comment"),
    "list_in_jsonl.jsonl": b"[" + LINE + b"]",
    "a_list.json": b"[" + LINE + b"," + LINE + b"]",
    "list_without_end.json": b"[" + LINE + b"," + LINE,
    "list_without_comma.json": b"[" + LINE + LINE + b"]",
    "list_of_lists.json": b"[[" + LINE + b"]]",
    "empty_list.json": b"[]",
    "empty_object.jsonl": raw("{}"),
    "scalar.json": b"3",
    "string.jsonl": raw('"the"'),
    "null.jsonl": raw("null"),
    "splits_without_rows.json": b'{"train": []}',
    "splits_of_scalars.json": b'{"train": [1, 2]}',
    "deep_list.jsonl": raw('{"prompt": ' + "[" * 100_000),
    "deep_and_closed.jsonl": raw('{"prompt": ' + "[" * 50_000 + "]" * 50_000 + ', "completion": "a", "label": 1}'),
    "deep_objects.jsonl": raw('{"a": ' * 20_000 + "1" + "}" * 20_000),
    "deep_beside_good.jsonl": raw(LINE.strip()[:-1] + b', "x": ' + b"[" * 400 + b"]" * 400 + b"}"),
    "html.jsonl": b"<!doctype html><html><body>404</body></html>\n",
    "lfs_pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "csv_in_jsonl.jsonl": b"prompt,completion,label\nthe,cat,1\n",
    "not_gzip.jsonl.gz": LINE,
    "cut_gzip.jsonl.gz": gzip.compress(LINE * 50)[:-12],
    "flipped_gzip.jsonl.gz": gzip.compress(LINE * 50)[:-5] + b"\x00" * 5,
    "not_zstd.jsonl.zst": LINE,
    "not_parquet.parquet": b"PAR1 no PAR1",
    "empty.parquet": b"",
    "not_arrow.arrow": b"ARROW1\x00\x00nothing",
    "empty.csv": b"",
    "ragged.csv": b"prompt,completion,label\nthe,cat,1\nthe,cat,1,more\n",
    "binary.csv": bytes(range(256)),
    "unknown.txt": LINE,
    "duplicate_keys.jsonl": raw('{"prompt": "a", "completion": "b", "label": 1, "label": "maybe"}'),
}
LABELS = {
    "nan_label.jsonl": of_label("NaN"),
    "infinite_label.jsonl": of_label("Infinity"),
    "minus_infinite_label.jsonl": of_label("-Infinity"),
    "huge_label.jsonl": of_label("1e999"),
    "long_integer_label.jsonl": of_label("9" * 5000),
    "nan_text_label.jsonl": of_label('"nan"'),
    "empty_label.jsonl": of_label('""'),
    "null_label.jsonl": of_label("null"),
    "label_two.jsonl": of_label("2"),
    "nested_label.jsonl": of_label('{"a": 1}'),
    "nan_weight.jsonl": LINE + line(weight=float("nan")),
    "negative_weight.jsonl": LINE + line(weight=-1),
    "huge_weight.jsonl": raw('{"prompt": "a", "completion": "b", "label": 1, "weight": 1e999}'),
    "long_weight.jsonl": raw('{"prompt": "a", "completion": "b", "label": 1, "weight": ' + "9" * 400 + "}"),
    "nan_step_label.jsonl": line(STEPS) + line(STEPS, labels=[1, float("nan")]),
    "short_step_labels.jsonl": line(STEPS) + line(STEPS, labels=[1]),
    "long_step_labels.jsonl": line(STEPS) + line(STEPS, labels=[1, 0, 1]),
}
TEXTS = {
    "empty_prompts.jsonl": line(prompt="") * 2,
    "null_prompt.jsonl": LINE + line(prompt=None),
    "number_prompt.jsonl": LINE + line(prompt=3),
    "empty_completion.jsonl": LINE + line(completion=""),
    "no_completion.jsonl": LINE + line(completion=...),
    "huge_line.jsonl": LINE + line(completion="x" * 3_000_000),
    "huge_key.jsonl": raw('{"' + "k" * 1_000_000 + '": 1, "prompt": "a", "completion": "b", "label": 1}'),
    "many_keys.jsonl": LINE + line(**{f"k{n}": n for n in range(20_000)}),
    "special_token.jsonl": LINE + line(completion="a<eos>b"),
    "special_token_prompt.jsonl": LINE + line(prompt="<eos><eos>"),
    "only_special_token.jsonl": LINE + line(completion="<eos>"),
    "path_as_prompt.jsonl": LINE + line(prompt="/etc/passwd", completion="file:///etc/passwd"),
    "traversal_as_id.jsonl": LINE + line(problem_id="../../../../tmp/x"),
    "template_as_text.jsonl": LINE + line(prompt="{{ 7 * 7 }} {% raw %} {0} {} %s ${HOME}"),
    "messages_without_flag.jsonl": LINE + line(prompt=[{"role": "user", "content": "Q"}]),
    "mixed_layouts.jsonl": LINE + line(PAIR) + line(STEPS),
    "pair_with_number.jsonl": line(PAIR) + line(PAIR, rejected=5),
    "empty_steps.jsonl": line(STEPS) + line(STEPS, completions=[], labels=[]),
    "empty_step.jsonl": line(STEPS) + line(STEPS, completions=["cat", ""]),
    "unknown_columns.jsonl": b'{"a": 1}\n{"b": 2}\n',
}
FILES: dict[str, bytes] = {**ENCODINGS, **SHAPES, **LABELS, **TEXTS}
