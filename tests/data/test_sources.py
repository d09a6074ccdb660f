"""Files of every kind, folders, several data sets, and names that lead nowhere."""

from types import SimpleNamespace

import datasets
import pytest

from pipa_openrlhf.data import sources
from pipa_openrlhf.data.sources import as_row, open_sources, rows_in_order
from pipa_openrlhf.errors import UserError


@pytest.fixture(params=[False, True], ids=["table", "stream"])
def read(request):
    def read(dataset, probs=None, split="train", max_samples=1_000_000, seed=42):
        sources = open_sources(dataset, split, max_samples, streaming=request.param)
        rows = rows_in_order(sources, [source.few_rows(max_samples) for source in sources], probs, seed, max_samples)
        return [(where, as_row(where, row)) for _, where, row in rows]

    return read


def table(name: str, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [f"{name}{index}" for index in range(count)]})


def prompts(rows) -> list[str]:
    return [row["prompt"] for _, row in rows]


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_has_one_split_whatever_the_flag_says(read, tmp_path, kind, split):
    path = str(tmp_path / f"data.{kind}")
    getattr(table("a", 3), f"to_{kind}")(path)
    rows = read(path, split=split)
    assert prompts(rows) == ["a0", "a1", "a2"]
    assert rows[1][0] == f"{path} {'line' if kind == 'json' else 'row'} 2"


def test_lists_and_messages_survive_parquet(read, tmp_path):
    path = str(tmp_path / "data.parquet")
    row = {"completions": ["a", "b"], "labels": [1, 0], "prompt": [{"role": "user", "content": "q"}]}
    datasets.Dataset.from_list([row]).to_parquet(path)
    assert read(path) == [(f"{path} row 1", row)]


def test_saved_folder(read, tmp_path):
    path = str(tmp_path / "saved")
    table("a", 2).save_to_disk(path)
    assert prompts(read(path, split="test")) == ["a0", "a1"]


def test_saved_folder_with_splits(read, tmp_path):
    path = str(tmp_path / "saved")
    datasets.DatasetDict({"train": table("a", 2), "valid": table("b", 1)}).save_to_disk(path)
    assert prompts(read(path)) == ["a0", "a1"]
    assert prompts(read(path, split="valid")) == ["b0"]
    with pytest.raises(UserError, match=r"no split 'test', it has train, valid; .*--data\.dataset_split"):
        read(path, split="test")


def test_a_folder_with_one_other_split_uses_it(read, tmp_path):
    path = str(tmp_path / "saved")
    datasets.DatasetDict({"valid": table("b", 2)}).save_to_disk(path)
    assert prompts(read(path, split="train")) == ["b0", "b1"]


def test_a_folder_of_files(read, tmp_path):
    table("a", 2).to_parquet(str(tmp_path / "train-00000.parquet"))
    table("b", 1).to_parquet(str(tmp_path / "test-00000.parquet"))
    assert prompts(read(str(tmp_path))) == ["a0", "a1"]
    with pytest.raises(UserError, match="no split 'valid', it has"):
        read(str(tmp_path), split="valid")


def test_data_dir_after_an_at_sign(read, tmp_path):
    (tmp_path / "inner").mkdir()
    table("a", 2).to_parquet(str(tmp_path / "inner" / "train.parquet"))
    table("b", 1).to_parquet(str(tmp_path / "train.parquet"))
    assert prompts(read(f"{tmp_path}@inner")) == ["a0", "a1"]


def test_max_samples_holds_for_each_and_for_all(read, write_rows):
    first = write_rows([{"prompt": f"a{index}"} for index in range(4)], "a.jsonl")
    second = write_rows([{"prompt": f"b{index}"} for index in range(4)], "b.jsonl")
    assert prompts(read(f"{first}, {second}")) == ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3"]
    assert prompts(read(f"{first},{second}", max_samples=3)) == ["a0", "a1", "a2"]
    assert prompts(read(f"{first},{second}", max_samples=6)) == ["a0", "a1", "a2", "a3", "b0", "b1"]


@pytest.mark.parametrize("seed", [1, 42])
@pytest.mark.parametrize("probs", ["0.5,0.5", "0.8,0.2", "0.1,0.9"])
def test_interleaved_as_openrlhf_does(read, write_rows, seed, probs):
    from pipa_openrlhf.distributed.upstream import blending_datasets

    rows = {name: [{"prompt": f"{name}{index}"} for index in range(count)] for name, count in (("a", 7), ("b", 4))}
    paths = ",".join(write_rows(rows[name], f"{name}.jsonl") for name in rows)
    quiet = SimpleNamespace(print=lambda *_: None, is_rank_0=lambda: False, args=SimpleNamespace(use_ms=False))
    theirs = blending_datasets(paths, probs, quiet, seed=seed)
    ours = read(paths, probs, seed=seed)
    assert prompts(ours) == theirs["prompt"][:]
    assert len(ours) > 11  # the smaller set is drawn from again until the larger is exhausted


def test_json_and_parquet_may_be_mixed(read, tmp_path, write_rows):
    path = str(tmp_path / "b.parquet")
    table("b", 2).to_parquet(path)
    assert prompts(read(f"{write_rows([{'prompt': 'a0'}])},{path}")) == ["a0", "b0", "b1"]


@pytest.mark.parametrize(
    "probs, problem",
    [
        ("0.5", "1 probabilities for 2 data sets"),
        ("0.5,x", "give numbers"),
        ("0.5,0.6", "add up to 1"),
        ("1,0", "above 0"),
        ("nan,0.5", "above 0"),
    ],
)
def test_bad_probabilities(read, write_rows, probs, problem):
    path = write_rows([{"prompt": "a"}])
    with pytest.raises(UserError, match=f"--data.dataset_probs {probs}: .*{problem}"):
        read(f"{path},{path}", probs)


@pytest.mark.parametrize("dataset", [None, "", "a.jsonl,,b.jsonl"])
def test_no_data_set_named(read, dataset):
    with pytest.raises(UserError, match=r"--data\.dataset is missing or has an empty name"):
        read(dataset)


@pytest.mark.parametrize("name", ["nowhere.parquet", "./nowhere", "/nowhere/at/all", "a/b/c", "nowhere/", "~/nowhere"])
def test_a_wrong_path_fails_without_the_network(read, monkeypatch, name):
    monkeypatch.setattr(sources, "hub_answers", lambda: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such file or folder; check --data.dataset"):
        read(name)


def test_an_unreachable_hub_is_asked_nothing(read, monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(sources, "hub_answers", lambda: False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_args, **_options: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="nobody/nothing: cannot be read .*the hub cannot be reached"):
        read("nobody/nothing")


def test_a_hub_without_that_data_set(read, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def not_found(*_args, **_kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(sources, "hub_answers", lambda: True)
    monkeypatch.setattr(HfApi, "dataset_info", not_found)
    with pytest.raises(UserError, match="no such data set on the hub"):
        read("nobody/nothing")


def test_folders_and_files_that_hold_no_data(read, tmp_path):
    with pytest.raises(UserError, match="the folder is empty"):
        read(str(tmp_path))
    (tmp_path / "notes.xyz").write_text("hello")
    with pytest.raises(UserError, match="unknown kind of file"):
        read(str(tmp_path / "notes.xyz"))
    with pytest.raises(UserError, match="cannot be read"):
        read(str(tmp_path))


def test_a_broken_parquet_file_is_one_line(read, tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"this is no parquet")
    with pytest.raises(UserError) as error:
        read(str(path))
    assert str(error.value).startswith(f"{path}: cannot be read (")
    assert "\n" not in str(error.value)


def test_scripts_are_not_run(read, tmp_path):
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="scripts are not run"):
        read(str(tmp_path / "code.py"))


def test_csv_cells_stay_as_they_stand(read, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion,label\n"1+1=",2,1\nNA,null,0\n,007,true\n"a\n""b"", c",1e5,False\n')
    cells = [("1+1=", "2", "1"), ("NA", "null", "0"), ("", "007", "true"), ('a\n"b", c', "1e5", "False")]
    names = ("prompt", "completion", "label")
    for name in (str(path), str(tmp_path)):  # the file, and the folder that holds it
        assert [row for _, row in read(name)] == [dict(zip(names, row)) for row in cells]
    assert len(read(str(path), max_samples=2)) == 2


def test_several_configs_are_named(read, tmp_path):
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        table(name, 2).to_parquet(str(tmp_path / name / "train.parquet"))
    configs = [f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("main", "socratic")]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    with pytest.raises(UserError) as error:
        read(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}: it holds several configs (main, socratic); give the folder of one as {tmp_path}@FOLDER"
    )
    assert prompts(read(f"{tmp_path}@socratic")) == ["socratic0", "socratic1"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "folder"])
def test_a_stream_has_an_identity_of_its_content(tmp_path, monkeypatch, kind):
    """It changes with the rows that are wanted, and is known again without reading them."""
    (tmp_path / "data").mkdir()
    file = str(tmp_path / "data" / f"data.{'csv' if kind == 'csv' else 'parquet'}")
    name = str(tmp_path / "data") if kind == "folder" else file
    readings = []
    rows_of = sources.rows_of
    monkeypatch.setattr(sources, "rows_of", lambda *given: readings.append(given) or rows_of(*given))

    def identity(most=100):
        (source,) = open_sources(name, "train", most, streaming=True)
        readings.clear()
        return source.identity(str(tmp_path / "hashes.json"))

    def write(count):
        getattr(table("a", count), "to_csv" if kind == "csv" else "to_parquet")(file)

    write(3)
    first = identity()
    assert first[1] == 3 and len(readings) == 1
    assert identity() == first and not readings
    write(4)
    second = identity()
    assert second != first and second[1] == 4
    assert identity(most=3) == first


def test_a_stream_of_another_hub():
    with pytest.raises(UserError, match="--data.streaming takes data sets of the Hugging Face hub"):
        open_sources("nobody/nothing", "train", 10, use_ms=True, streaming=True)


def test_a_data_set_of_the_hub_is_known_by_its_commit(monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "dataset_info", lambda _self, name: SimpleNamespace(sha=f"commit of {name}"))
    assert sources._stamp("someone/data@part") == ["commit of someone/data"]


def test_a_table_is_hashed_once(tmp_path, monkeypatch):
    """Its rows decide, however many processes and starts ask; other rows of the same file are another table."""
    path, memory = str(tmp_path / "data.parquet"), str(tmp_path / "hashes.json")
    hashed = []
    digest_of = sources.digest_of
    monkeypatch.setattr(sources, "digest_of", lambda one: hashed.append(len(one)) or digest_of(one))

    def identity(most=100):
        (source,) = open_sources(path, "train", most)
        return source.identity(memory)

    table("a", 3).to_parquet(path)
    first = identity()
    assert identity() == first and hashed == [3]
    assert identity(most=2) != first and hashed == [3, 2]
    table("b", 3).to_parquet(path)
    assert identity() != first and hashed == [3, 2, 3]
