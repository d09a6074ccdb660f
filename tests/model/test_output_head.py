"""The policy's log-probs and gradients against the model's own whole logits, for every kind of output head."""

import numpy as np
import pytest
import torch
import transformers
from samples import random_samples
from torch.utils._python_dispatch import TorchDispatchMode

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.model import output_head
from pipa_openrlhf.model.output_head import chunk_tokens, single_pass_loss
from pipa_openrlhf.model.policy import Policy, ValueHead
from pipa_openrlhf.objectives.batch_loss import TokenTerms
from pipa_openrlhf.objectives.sft import sft_token_loss

VOCAB = 97
CHUNK = 5
LENGTHS = [(3, 7), (2, 1), (5, 4), (1, 11)]
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral-window": ("Mistral", {"sliding_window": 4}),
    "gemma2-softcap": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 4}),
    "granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "phi-bias": ("Phi", {}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "gpt-neox": ("GPTNeoX", {}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


def make(name: str):
    kind, changes = MODELS[name]
    common = {key: value for key, value in SMALL.items() if kind != "GPT2" or key != "hidden_size"}
    torch.manual_seed(0)
    model_class = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    model = model_class(getattr(transformers, f"{kind}Config")(**common, **changes))
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)  # biases too
    return model.eval()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one partial."""
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", CHUNK * VOCAB)


def whole_log_probs(model, sample) -> torch.Tensor:
    logits = model(torch.tensor(sample.input_ids[None].astype(np.int64))).logits[0].float()
    targets = torch.tensor(sample.input_ids[sample.prompt_len :].astype(np.int64))
    return torch.log_softmax(logits, -1)[sample.prompt_len - 1 : -1].gather(1, targets[:, None])[:, 0]


def sft_terms(batch) -> TokenTerms:
    count = len(batch.targets)
    zeros = torch.zeros(count)
    return TokenTerms(sft_token_loss, zeros, zeros, torch.full((count,), 1 / count), zeros)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_the_models_own(name, packed):
    model = make(name)
    samples = random_samples(LENGTHS, VOCAB)
    with torch.no_grad():
        expected = [whole_log_probs(model, sample) for sample in samples]
    batch = collate(samples, None, 0, "packed" if packed else "padded")
    log_f = Policy(model)(batch).log_f
    for row, values in zip(log_f, expected):
        torch.testing.assert_close(row[: len(values)], values, rtol=1e-5, atol=2e-5)
        assert not row[len(values) :].any()


@pytest.mark.parametrize("fused", [False, True], ids=["two_passes", "single_pass"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_full_fine_tuning_are_those_of_the_ordinary_loss(name, fused):
    samples = random_samples(LENGTHS, VOCAB)
    ordinary = make(name)
    loss = -torch.cat([whole_log_probs(ordinary, sample) for sample in samples]).mean()
    loss.backward()

    model = make(name)
    batch = collate(samples, None, 0, "padded")
    if fused:
        ours = Policy(model)(batch, sft_terms(batch)).loss
    else:
        ours = -Policy(model)(batch).log_f.sum() / len(batch.targets)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = dict(ordinary.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        wanted = expected[parameter_name].grad
        assert wanted is not None or parameter.grad is None or not parameter.grad.any(), parameter_name
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5, msg=parameter_name)


def test_a_chunk_fills_a_share_of_the_free_memory(monkeypatch):
    monkeypatch.undo()  # of the small chunks
    sizes = {free: chunk_tokens(152_064, free) for free in (None, 0, 2**30, 8 * 2**30, 2**40)}
    # A quarter of 8 GiB holds 882 tokens of 16 bytes a logit, of which the power of two below is taken.
    assert sizes == {None: 220, 0: 220, 2**30: 220, 8 * 2**30: 512, 2**40: 2048}
    assert chunk_tokens(258, 2**40) == chunk_tokens(258, None) == 2**25 // 258, "small vocabularies lose nothing"
    assert chunk_tokens(2**30, None) == 1


@pytest.mark.parametrize("fused", [False, True], ids=["two_passes", "single_pass"])
def test_free_memory_changes_the_chunks_and_nothing_else(monkeypatch, fused):
    batch, results = collate(random_samples(LENGTHS, VOCAB), None, 0, "padded"), []
    for free, rows in ((None, CHUNK), (4 * 16 * VOCAB * 9, 8)):
        monkeypatch.setattr(output_head, "free_memory", lambda free=free: free)
        policy = Policy(make("llama"))
        with RowsOfLogits() as seen:
            output = policy(batch, sft_terms(batch) if fused else None)
            (output.loss if fused else output.log_f.sum()).backward()
        assert seen.most == rows
        results.append((output.log_f, *(one.grad for one in policy.parameters())))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def nll(log_f, log_p, u, label):
    return -log_f


def pipa_n(log_f, log_p, u, label):
    score = log_f - log_p + u
    return -torch.nn.functional.logsigmoid(torch.where(label != 0, score, -score))


@pytest.mark.parametrize("token_loss", [nll, pipa_n])  # the package's are float32, too coarse for finite differences
@pytest.mark.parametrize("chunk_size", [1, 3, 99])
def test_single_pass_gradient_is_the_derivative(token_loss, chunk_size):
    """In float64, against finite differences, for hidden states and a trained head."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    targets, labels = torch.randint(0, 11, (7,)), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    log_p, u = torch.randn(7, dtype=torch.float64) - 2, torch.randn(7, dtype=torch.float64) - 2
    terms = TokenTerms(token_loss, log_p, labels, torch.rand(7, dtype=torch.float64), torch.rand(7).double())

    def loss(hidden, weight):
        return single_pass_loss(hidden, targets, u, terms, lambda part: part @ weight.T, (weight,), chunk_size)[1]

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    frozen = weight.detach()
    assert torch.autograd.gradcheck(
        lambda hidden: single_pass_loss(
            hidden, targets, u, terms, lambda part: part @ frozen.T, (frozen,), chunk_size
        )[1],
        (hidden,),
    )


class RowsOfLogits(TorchDispatchMode):
    """Most rows that any tensor over the vocabulary has."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCAB and tensor.shape[-2] != 16:
                self.most = max(self.most, tensor.numel() // VOCAB)
        return result


@pytest.mark.parametrize("fused", [False, True], ids=["two_passes", "single_pass"])
def test_logits_of_a_whole_batch_never_exist(fused):
    model = make("llama")
    batch = collate(random_samples(LENGTHS, VOCAB), None, 0, "padded")
    assert len(batch.targets) > 4 * CHUNK
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with RowsOfLogits() as rows, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy = Policy(model, ValueHead(16, 16, torch.float32))
        output = policy(batch, sft_terms(batch) if fused else None)
        if not fused:  # a single pass has its chunk's graph, gone before the next one
            assert [shape for shape in kept if shape[-1:] == (VOCAB,) and len(shape) > 1] == []
        (output.loss if fused else output.log_f.sum()).backward()
    assert rows.most == CHUNK
    with RowsOfLogits() as rows:  # the probe does see whole logits
        model(batch.input_ids)
    assert rows.most == batch.input_ids.numel()


@pytest.mark.parametrize("fused", [False, True], ids=["two_passes", "single_pass"])
def test_the_gradient_of_a_bf16_head_does_not_depend_on_the_number_of_chunks(fused):
    """A sum over chunks that is rounded to bf16 after each would be off by its own size over a few hundred of them."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 8).bfloat16(), (torch.randn(31, 8) * 0.3).bfloat16().requires_grad_()
    targets, zeros = torch.randint(0, 31, (512,)), torch.zeros(512)
    terms = TokenTerms(sft_token_loss, zeros, zeros, torch.ones(512), zeros)

    def gradient(chunk_size: int) -> torch.Tensor:
        def logits_of(part):
            return (part @ weight.T).float()

        if fused:
            loss = single_pass_loss(hidden, targets, zeros, terms, logits_of, (weight,), chunk_size)[1]
        else:
            loss = -output_head.chunked_log_probs(hidden, targets, logits_of, (weight,), chunk_size).sum()
        return torch.autograd.grad(loss, weight)[0].float()

    whole, pieces = gradient(512), gradient(2)
    assert (pieces - whole).norm() < 2**-8 * whole.norm()


def test_head_without_targets_still_gives_logits():
    model = make("gemma2-softcap")
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    Policy(model)
    torch.testing.assert_close(model(ids).logits, before)


def test_only_labelled_tokens_are_scored():
    sample = random_samples([(2, 6)], VOCAB)[0]
    sample.mask[1:3] = 0
    model = make("llama")
    log_f = Policy(model)(collate([sample], None, 0, "padded")).log_f[0]
    whole = Policy(model)(collate([sample], None, 0, "padded", every_response_token=True)).log_f[0]
    assert not log_f[1:3].any() and whole[1:3].all()
    torch.testing.assert_close(log_f[3:], whole[3:])
