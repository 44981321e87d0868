"""Model families: tiny random models of each, against their own full forward pass.

The weights are larger than at an initialisation, so that what follows a head (a scale, a soft cap)
and what a block does to its neighbours can be seen in the log-probs.
"""

import math
import os
import shutil

import pytest
import torch
from conftest import as_flags, metrics, refused, run, together, weights
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Ernie4_5_MoeConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    T5Config,
)
from transformers.utils import logging

import common
import dnpo
import job
import sams
import toy
import tso

logging.disable_progress_bar()  # stderr is looked at
CPU = torch.device("cpu")
V = 100  # vocabulary
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONG.update(rope_theta=1e4, original_max_position_embeddings=32)
PHI3 = {"rope_parameters": LONG, "original_max_position_embeddings": 32}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}


def shape(kind, **more):
    """A config of a family, in the shape that all share."""
    return kind(**{**SHAPE, **more})


def seeing(**more):
    """Gemma-3 with eyes: its text model is wrapped."""
    text = {**SHAPE, "sliding_window": 4, **more}
    return Gemma3Config(
        text_config=text,
        vision_config=EYES,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )


FAMILIES = {
    "Llama": shape(LlamaConfig),
    "Llama, dynamic rope": shape(LlamaConfig, rope_parameters=DYNAMIC),
    "Mistral, window": shape(MistralConfig, sliding_window=4),
    "Qwen2": shape(Qwen2Config),
    "Qwen3": shape(Qwen3Config),
    "Qwen3-MoE": shape(Qwen3MoeConfig, decoder_sparse_step=1, **EXPERTS),
    "Qwen3-Next, linear alone": shape(Qwen3NextConfig, **EXPERTS),
    "ERNIE-4.5-MoE": shape(Ernie4_5_MoeConfig, moe_num_experts=4, moe_k=2, **EXPERTS),
    "Gemma-2": shape(Gemma2Config, sliding_window=4, final_logit_softcapping=1.0),
    "Gemma-3 text": shape(Gemma3TextConfig, sliding_window=4),
    "Gemma-3 with eyes": seeing(),
    "Phi-3": shape(Phi3Config),
    "Phi-3, long rope": shape(Phi3Config, **PHI3),
    "OLMo-2": shape(Olmo2Config),
    "SmolLM3": shape(SmolLM3Config),
    "Granite": shape(GraniteConfig, logits_scaling=0.25),
    "Cohere": shape(CohereConfig, logit_scale=4.0),
    "Falcon-H1": shape(FalconH1Config, lm_head_multiplier=4.0, mamba_d_state=8, **MAMBA),
    "GPT-NeoX": shape(GPTNeoXConfig),
    "GPT-2": GPT2Config(**GPT, bos_token_id=1, eos_token_id=2),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(name or config): the folder of a model of a family, with the toy tokenizer."""
    made = {}

    def make(what, name: str = "", seed: int = 0):
        name = name or what
        if name not in made:
            torch.manual_seed(seed)
            config = FAMILIES[what] if isinstance(what, str) else what
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for p in lm.parameters():
                if p.dim() > 1:
                    p.data *= 6
            made[name] = tmp_path_factory.mktemp("family")
            lm.save_pretrained(made[name])
            toy.tokenizer().save_pretrained(made[name])
        return made[name]

    return make


# prompt and response ids of sequences of unequal length
SEQUENCES = [([1, 40, 41, 7], [50, 9, 51, 52, 30, 31, 32, 70, 71, 72, 73, 74]), ([1, 60], [8, 61])]


def own_logits(lm, ids: list[int]) -> torch.Tensor:
    """The model's own logits for one sequence alone: [T, V]."""
    return lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def own_logp(lm, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log pi(response|prompt), token by token, from the model's own logits."""
    logps = own_logits(lm, prompt + response).log_softmax(-1)
    total = 0.0
    for t, token in enumerate(response):
        total = total + logps[len(prompt) + t - 1, token]
    return total


def block_outputs(lm, ids: list[int]) -> list[torch.Tensor]:
    """What each decoder block gives for one sequence alone: L tensors [T, D]."""
    states = lm(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return [layer[0] for layer in states.hidden_states]


def sharp(folder):
    """A model that is loaded by nothing of ours."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_of_a_padded_batch_are_the_models_own_of_each_sequence_alone(folder_of, name):
    """log pi(y|x) of two sequences of unequal length, and every block's mean state over y.

    The block before the last norm has no hidden state of its own in transformers: those before it
    are compared.
    """
    scorer = sams.PoolingScorer(common.load_lm(str(folder_of(name)), torch.float32, CPU))
    lm = sharp(folder_of(name))
    with torch.no_grad():
        ids, mask = common.collate(SEQUENCES, CPU)
        logps, pooled = scorer(ids, mask, mask)
        for i, (prompt, response) in enumerate(SEQUENCES):
            wanted = own_logp(lm, prompt, response)
            assert logps[i].item() == pytest.approx(wanted.item(), abs=1e-4)

            layers = block_outputs(lm, prompt + response)[1:-1]
            assert pooled.shape == (2, len(layers) + 1, 32)
            for layer, states in enumerate(layers):
                mean = states[len(prompt) :].mean(0)
                torch.testing.assert_close(pooled[i, layer], mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_of_a_padded_batch_are_those_of_each_prompt_alone(
    monkeypatch, folder_of, name
):
    """Eight tokens each, against the largest of the model's own logits, without any cache.

    Then the same with prompts that are there twice, whose cache is shared where it can be.
    """
    lm = common.load_lm(str(folder_of(name)), torch.float32, CPU)
    prompts = [[1, 40, 41, 42, 43, 44, 45, 46, 47], [1, 60, 61], [5]]
    read_ids(monkeypatch)
    answers = common.sample(lm, None, prompts, 0.0, 8, seed=0)
    twice = prompts + prompts[::-1]
    answers += common.sample(lm, None, twice, 0.0, 8, seed=0)
    for prompt, (text, *_) in zip(prompts + twice, answers):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 8:
                token = own_logits(lm, ids)[-1].argmax().item()
                if token == 2:
                    break
                ids.append(token)
        assert text == str(ids[len(prompt) :])


def read_ids(monkeypatch):
    """From here on an answer's text is the list of its ids up to token 2, without a tokenizer."""

    def read_answer(tok, ids, ends):
        return common.Drawn(str(ids[: ids.index(2)] if 2 in ids else ids), "stop")

    monkeypatch.setattr(common, "end_tokens", lambda lm, tok: {2})
    monkeypatch.setattr(common, "read_answer", read_answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_with_recomputed_activations_are_those_of_the_models_own_log_probs(
    folder_of, name
):
    """The model as `shard` makes it for training, against backpropagation through its forward."""
    c = sams.Config(dtype="float32", activation_checkpointing=True)
    scorer = sams.shard(sams.PoolingScorer, str(folder_of(name)), c, CPU)
    logps, _ = scorer(*common.collate(SEQUENCES, CPU))
    (logps * torch.tensor([1.0, -2.0])).sum().backward()

    lm = sharp(folder_of(name))
    chosen, rejected = (own_logp(lm, *sequence) for sequence in SEQUENCES)
    (chosen - 2 * rejected).backward()
    for (name, p), (_, own) in zip(scorer.lm.named_parameters(), lm.named_parameters()):
        if own.grad is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, own.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_loaded_again(folder_of, tmp_path, name):
    """save_checkpoint writes what from_pretrained reads: the same log-probs to the bit."""
    source = str(folder_of(name))
    scorer = common.Scorer(common.load_lm(source, torch.float32, CPU))
    with torch.no_grad():
        for p in scorer.parameters():
            p += 0.01 * torch.ones_like(p).cumsum(0) / len(p)
        saved = own_logp(scorer.lm, *SEQUENCES[0])
    job.save_checkpoint(tmp_path / "checkpoint", scorer, toy.tokenizer(), source)
    with torch.no_grad():
        assert own_logp(sharp(tmp_path / "checkpoint"), *SEQUENCES[0]) == saved


def run_flags(world, folder, out, **more) -> list[str]:
    """Flags of three steps of a script from a family's model."""
    flags = {
        "preset": "toy",
        "model": folder,
        "limit": 24,
        "batch": 8,
        "micro_batch": 4,
        "max_response": 16,
        "max_prompt": 32,
        "max_steps": 3,
        "out": out,
    }
    flags.update(more)
    return as_flags(flags)


def script_flags(module, world, folder, out, **more) -> list[str]:
    """The same, with what each script needs."""
    if module is sams:
        own = {"data": world / "pairs.jsonl", "test_pairs": 4, "reference": out / "reference"}
    else:
        own = {"data": world / "train.jsonl", "test": world / "test.jsonl", "test_prompts": 4}
    if module is dnpo:
        own.update(warmup_iterations=0, iterations=1, noise_init=1.0, epochs=1)
    if module is tso:
        own.update(older=folder, smaller=folder, negatives="smaller", slices=1, n_scores=0)
    return run_flags(world, folder, out / "run", **own, **more)


TRAINED = {dnpo: "iter1", tso: "round1-slice1", sams: ""}


@pytest.mark.parametrize("module", TRAINED, ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", ["Gemma-2", "GPT-NeoX", "Gemma-3 with eyes"])
def test_a_script_trains_three_steps(monkeypatch, world, folder_of, tmp_path, module, name):
    """A whole run, header to checkpoint, whose weights have moved and are finite."""
    folder = folder_of(name)
    run(monkeypatch, module, *script_flags(module, world, folder, tmp_path))
    steps = metrics(tmp_path / "run")
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert all(math.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in steps)

    before, after = weights(folder), weights(tmp_path / "run" / TRAINED[module] / "checkpoint")
    assert before.keys() == after.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    text = [key for key in before if "vision" not in key and "projector" not in key]
    assert moved == text
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_ranks_that_replicate_or_shard_any_family_train_as_one_process(
    monkeypatch, world, folder_of, tmp_path
):
    """DDP where parameters never get a gradient (an expert's correction bias, eyes), and FSDP.

    The same pairs are selected as in one process, and the same model comes out. (Not the same
    weights: a bias of attention keys has no gradient but rounding.)
    """
    cases = [
        ("ERNIE-4.5-MoE", "ddp"),
        ("Gemma-3 with eyes", "ddp"),
        ("Gemma-3 with eyes", "fsdp"),
        ("GPT-NeoX", "fsdp"),
        ("Gemma-2", "fsdp"),
    ]
    runs, folders = [], []
    for name, parallel in cases:
        one, two = tmp_path / f"{name} one {parallel}", tmp_path / f"{name} two {parallel}"
        more = {"parallel": parallel, "activation_checkpointing": True, "save_every": 1, "lr": 1e-3}
        run(monkeypatch, sams, *script_flags(sams, world, folder_of(name), one, **more))
        flags = script_flags(sams, world, folder_of(name), two, **more)
        runs.append((2, False, flags))
        folders.append((one / "run", two / "run"))
    together(sams, tmp_path, 2, runs)

    for one, two in folders:
        selected = [m["selected/indices"] for m in metrics(one)]
        assert [m["selected/indices"] for m in metrics(two)] == selected
        with torch.no_grad():
            for sequence in SEQUENCES:
                a = own_logp(sharp(one / "checkpoint"), *sequence)
                b = own_logp(sharp(two / "checkpoint"), *sequence)
                assert b.item() == pytest.approx(a.item(), abs=1e-3)


def test_margins_within_rounding_are_all_equal():
    """min-max of a range below 1e-4 is 0.5 everywhere; of a larger one it is not."""
    rounding = torch.tensor([0.0, 9e-6, -8e-5])
    assert sams.min_max(rounding).tolist() == [0.5] * 3
    assert sams.min_max(rounding - 40).tolist() == [0.5] * 3
    assert sams.min_max(torch.tensor([0.0, 1.0, 2.0]) * 2e-4).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("name", ["Gemma-2", "Granite"])
def test_the_noise_comes_after_the_soft_cap_and_the_scale(folder_of, name):
    """log p_noise of a rejected answer, from the model's own logits plus sigma eps."""
    lm = sharp(folder_of(name))
    reference = dnpo.NoisyReference(sharp(folder_of(name)), init="2.0")
    logps, clean_logps, drop, square = reference(*common.collate(SEQUENCES, CPU), seeds=[5])

    prompt, response = SEQUENCES[1]
    with torch.no_grad():
        logits = own_logits(lm, prompt + response)[len(prompt) - 1 : -1]
        chosen = own_logp(lm, *SEQUENCES[0])
    eps = dnpo.draw([(5, 0), (5, 1)], V, CPU)
    noisy = (logits + 2.0 * eps).log_softmax(-1)
    wanted = noisy[range(len(response)), response].sum()
    assert logps[1].item() == pytest.approx(wanted.item(), abs=1e-4)
    assert logps[0].item() == pytest.approx(chosen.item(), abs=1e-4)
    clean = logits.log_softmax(-1)[range(len(response)), response].sum()
    assert clean_logps.item() == pytest.approx(clean.item(), abs=1e-4)


FIVE_LAYERS = {
    "Gemma-3 with eyes": seeing(num_hidden_layers=5),
    "Falcon-H1": shape(FalconH1Config, num_hidden_layers=5, mamba_d_state=8, **MAMBA),
}


@pytest.mark.parametrize("name", FIVE_LAYERS)
def test_the_smaller_model_of_a_family_is_what_was_saved(folder_of, tmp_path, monkeypatch, name):
    """toy.py's first layers, of a model whose layers are those of a part of it, or of two kinds."""
    path = str(folder_of(FIVE_LAYERS[name], f"{name}, five layers"))
    tok, _ = common.load_tokenizer(path)
    trained = []
    save = toy.save
    monkeypatch.setattr(toy, "save", lambda lm, *where: (trained.append(lm), save(lm, *where)))
    rows = [{"prompt": [{"role": "user", "content": "badc"}], "response": "abcd"}]
    toy.train_smaller(tmp_path / "smaller", path, tok, rows, CPU)

    assert len(common.blocks(trained[0])) == 4
    found = own_logits(sharp(tmp_path / "smaller"), [1, 40, 41, 7])
    torch.testing.assert_close(found, own_logits(trained[0], [1, 40, 41, 7]))


@pytest.mark.parametrize("name", ["GPT-2", "Gemma-3 with eyes"])
def test_the_memory_plan_leaves_out_what_a_config_does_not_say(folder_of, name):
    """GPT-2 has no intermediate_size: no activations are counted. A wrapper's text config counts.

    Weights are 4 bytes each, whatever the config says.
    """
    lm = common.lm_shapes(str(folder_of(name)))
    c = dnpo.Config(parallel="none")
    parts = job.memory_parts(lm, c, chunk=common.CHUNK, reference=True)
    numbers = sum(p.numel() for p in sharp(folder_of(name)).parameters())
    assert parts["weights"] == 4 * numbers
    assert ("activations up to about" in parts) == (name != "GPT-2")


# ---------------------------------------------------------------- what is refused


REFUSED = {
    "decoder blocks of bert models were not found": shape(BertConfig),
    "an encoder-decoder": T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2),
    "without attention": MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2),
    "quantised": shape(LlamaConfig, quantization_config={"quant_method": "fp8"}),
    "context of 16 tokens": GPT2Config(**{**GPT, "n_positions": 16}),
    "context of 32 tokens": FAMILIES["Phi-3, long rope"],
}


@pytest.mark.parametrize("module", [dnpo, tso, sams], ids=lambda module: module.__name__)
@pytest.mark.parametrize("complaint", REFUSED)
def test_a_model_that_cannot_be_trained_is_one_line_before_the_plan(
    monkeypatch, capsys, world, tmp_path, module, complaint
):
    """A kind of model, or a length at which rope scaling would depend on the batch."""
    REFUSED[complaint].save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    flags = script_flags(module, world, tmp_path / "model", tmp_path)

    def show_plan(*args):
        pytest.fail("the plan was shown")

    monkeypatch.setattr(module, "show_plan", show_plan)
    assert complaint in refused(monkeypatch, capsys, module, flags)
    assert not (tmp_path / "run").exists()


UNKNOWN = {
    "hyperclovax": shape(HyperCLOVAXConfig, logits_scaling=4.0),  # others divide by it
    "modernbert-decoder": shape(ModernBertDecoderConfig),  # a layer between states and head
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_model_whose_log_probs_would_be_wrong_is_one_line(monkeypatch, capsys, folder_of, kind):
    """No Scorer is made of it, of whatever kind; sampling needs none."""
    lm = common.load_lm(str(folder_of(UNKNOWN[kind], kind)), torch.float32, CPU)
    for wrap in (common.Scorer, sams.PoolingScorer, lambda lm: dnpo.NoisyReference(lm, 0.1)):
        with pytest.raises(SystemExit) as stop:
            wrap(lm)
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.count("\n") == 1
        assert f"log-probs of this kind of model ({kind}) would be wrong by" in err
    read_ids(monkeypatch)
    assert common.sample(lm, None, [[1, 60], [5]], 0.0, 4, seed=0)


def test_blocks_that_see_their_batch_mates_are_one_line(capsys, folder_of):
    """No name in a config tells; the two sequences of the check do."""

    def mix(block, args, states):
        return states + 0.1 * states.mean(0, keepdim=True)

    lm = common.load_lm(str(folder_of("Llama")), torch.float32, CPU)
    common.blocks(lm)[0].register_forward_hook(mix)
    with pytest.raises(SystemExit) as stop:
        common.Scorer(lm)
    assert stop.value.code == 2
    assert "they depend on what else is in the batch" in capsys.readouterr().err


def test_a_model_that_fails_the_check_ends_a_run(monkeypatch, capsys, world, folder_of, tmp_path):
    """One line and exit code 2 when it is loaded to be trained; no checkpoint is left."""
    folder = folder_of(UNKNOWN["hyperclovax"], "hyperclovax")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, sams, *script_flags(sams, world, folder, tmp_path))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("would be wrong by") == 1
    assert not list(tmp_path.rglob("checkpoint"))


def test_scaled_rope_is_one_function_up_to_the_length_of_its_pretraining(capsys, folder_of):
    """Beyond it the frequencies depend on the longest sequence of the batch: one line.

    context_of says where: for every type of layer, and in a wrapper's text config.
    """
    assert common.context_of(FAMILIES["Phi-3, long rope"]) == 32
    assert common.context_of(FAMILIES["Llama, dynamic rope"]) == 64
    assert common.context_of(FAMILIES["Gemma-3 with eyes"]) == 64
    plain = {"rope_type": "default", "rope_theta": 1e4}
    layers = {"sliding_attention": plain, "full_attention": {**LONG, "short_factor": [1.0] * 4}}
    assert common.context_of(shape(Gemma3TextConfig, rope_parameters=layers)) == 32
    assert common.context_of(MambaConfig()) > 10**9

    lm = common.load_lm(str(folder_of("Phi-3, long rope")), torch.float32, CPU)
    scorer = common.Scorer(lm)
    long = [1] * 32
    scorer(*common.collate([(long[:1], long[1:])], CPU))
    with pytest.raises(SystemExit):
        scorer(*common.collate([(long, [5]), *SEQUENCES], CPU))
    assert "33 tokens are more than the model's context of 32" in capsys.readouterr().err


def test_blocks_that_give_no_states_are_one_line_of_sams_alone(monkeypatch, capsys, folder_of):
    """Contexts need [S, T, D] of each block; log-probs don't."""
    scorer = sams.PoolingScorer(common.load_lm(str(folder_of("Llama")), torch.float32, CPU))
    block = common.blocks(scorer.lm)[0]
    args = common.collate(SEQUENCES, CPU)
    logps, _ = scorer(*args)
    streams = torch.zeros(*args[0].shape, 4, 32)  # as DeepSeek-V4's, which is widened to 4 streams
    scorer.mask = args[1]
    with pytest.raises(SystemExit) as stop:
        scorer.keep_mean(0, block, (), streams)
    assert stop.value.code == 2
    assert "give [2, 16, 4, 32], not [S, T, D]" in capsys.readouterr().err
    assert torch.equal(scorer(*args)[0], logps)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read_are_one_line(capsys, folder_of, tmp_path, name):
    """A pointer to a file elsewhere, a file that was cut, or no file."""
    folder = tmp_path / "model"
    shutil.copytree(folder_of("Llama"), folder)
    torch.save(weights(folder), folder / "pytorch_model.bin")
    whole = (folder / name).read_bytes()
    for file in ("model.safetensors", "pytorch_model.bin"):
        (folder / file).unlink()

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n"
    for wrong in (None, pointer, whole[:-100], whole[: len(whole) // 2], b""):
        if wrong is not None:
            (folder / name).write_bytes(wrong)
        with pytest.raises(SystemExit) as stop:
            common.load_lm(str(folder), torch.float32, CPU)
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.startswith(f"error: {folder} is damaged (")
        assert err.count("\n") == 1


def test_a_model_is_told_from_another_one_by_its_weights_of_any_format(tmp_path):
    """Size and time of *.safetensors and *.bin; a config or a template is no weight."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "model.safetensors"):
        file = tmp_path / name
        file.write_bytes(b"1234")
        before = common.weights_stamp(str(tmp_path))
        os.utime(file, ns=(1, 1))
        assert common.weights_stamp(str(tmp_path)) != before
    (tmp_path / "config.json").write_text("{ }")
    assert common.weights_stamp(str(tmp_path)) == [
        ("model.safetensors", 4, 1),
        ("pytorch_model.bin", 4, 1),
    ]
