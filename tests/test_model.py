"""The network against oracles that share nothing with it: transformers, complex numbers, and plain numpy loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from arkasr import model
from arkasr.config import ModelConfig
from conftest import random_network

Array = npt.NDArray[np.float64]
LENGTHS = (40, 1, 5, 77, 6, 29)  # mel frames; 1 -> one encoder frame, 5 and 6 -> three
LOUDNESS = (0.3, 1.0, 0.5, 4.0, 1.0, 2.0)


def worst(ours: Tensor, theirs: Any) -> float:
    """Largest absolute difference, of tensors of one shape."""
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max())


def published(network: model.ArkASR, prefix: str = "") -> dict[str, Tensor]:
    """The float32 tensors whose published name starts with prefix, without it."""
    tensors = model.published_tensors(network, torch.float32)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)}


def random_mels(num_mels: int, lengths: tuple[int, ...] = LENGTHS, *, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_mels, length, generator=generator) * LOUDNESS[n % len(LOUDNESS)]
        for n, length in enumerate(lengths)
    ]


def padded(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips [M, F] as one zero-padded batch and their frame counts."""
    batch = torch.zeros(len(clips), clips[0].shape[0], max(clip.shape[1] for clip in clips))
    for row, clip in enumerate(clips):
        batch[row, :, : clip.shape[1]] = clip
    return batch, torch.tensor([clip.shape[1] for clip in clips])


def prompt_for(config: ModelConfig, num_frames: int, *, seed: int, text: int = 5) -> list[int]:
    """A made-up prompt: the right number of <|audio|> between random ids."""
    words = np.random.default_rng(seed).integers(0, 200, size=text + 2).tolist()
    return [*words[:2], *[config.audio_token_id] * max((num_frames + 1) // 2 // 4, 1), *words[2:]]


# ---- decoder = Qwen2 ----


def qwen2(network: model.ArkASR) -> Any:
    config = network.config
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=config.hidden_dim,
            num_hidden_layers=config.decoder_layers,
            num_attention_heads=config.decoder_heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.decoder_ffn_dim,
            vocab_size=config.vocab_size,
            tie_word_embeddings=config.tied_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.rms_eps,
            max_position_embeddings=512,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    tensors = {name: t for name, t in published(network).items() if not name.startswith("audio_encoder.")}
    if config.tied_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    theirs.load_state_dict(tensors, strict=True)
    return theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 4, "tied_embeddings": False},
        {"kv_heads": 1, "rope_theta": 1e4},
        {"hidden_dim": 48, "decoder_heads": 6, "kv_heads": 3, "decoder_layers": 3, "rms_eps": 1e-5},
        {"hidden_dim": 24, "decoder_heads": 2, "kv_heads": 2, "rope_theta": 500.0, "tied_embeddings": False},
    ],
    ids=["gqa-tied", "mha-untied", "mqa-theta1e4", "gqa3-wider", "mha-theta500"],
)
def test_decoder_is_qwen2(small: ModelConfig, changes: dict[str, Any]) -> None:
    network = random_network(replace(small, **changes))
    mel, num_frames = padded(random_mels(small.num_mels, (64, 64)))
    ids = torch.tensor([prompt_for(network.config, 64, seed=s, text=20) for s in (1, 2)])
    with torch.inference_mode():
        ours = network(mel, num_frames, ids)
        embeddings = torch.nn.functional.embedding(ids, network.decoder.embed.weight)
        embeddings[:, 2:10] = network.encode(mel, num_frames)
        theirs = qwen2(network)(inputs_embeds=embeddings).logits
    assert ours.std() > 0.1
    assert worst(ours, theirs) < 1e-4


# ---- encoder without RoPE = Whisper ----


@pytest.mark.parametrize(
    "changes",
    [{}, {"encoder_dim": 48, "encoder_heads": 3, "encoder_layers": 3, "num_mels": 128}],
    ids=["two-layers", "three-layers"],
)
def test_encoder_without_rope_is_whisper(small: ModelConfig, changes: dict[str, Any]) -> None:
    config = replace(small, use_rope=False, max_encoder_frames=24, **changes)
    network = random_network(config)
    theirs = WhisperEncoder(
        WhisperConfig(
            d_model=config.encoder_dim,
            encoder_layers=config.encoder_layers,
            encoder_attention_heads=config.encoder_heads,
            encoder_ffn_dim=config.encoder_ffn_dim,
            num_mel_bins=config.num_mels,
            max_source_positions=config.max_encoder_frames,
            attn_implementation="eager",
        )
    ).eval()
    theirs.layer_norm = torch.nn.Identity()
    theirs.load_state_dict(published(network, "audio_encoder.whisper."), strict=True)
    layers_ours: list[Tensor] = []
    layers_theirs: list[Tensor] = []

    def keep(into: list[Tensor]) -> Callable[..., None]:
        return lambda _module, _inputs, out: into.append(out[0] if isinstance(out, tuple) else out)

    for layer in network.encoder.layers:
        layer.register_forward_hook(keep(layers_ours))
    for layer in theirs.layers:
        layer.register_forward_hook(keep(layers_theirs))
    mel = torch.stack(random_mels(config.num_mels, (48, 48)))
    with torch.inference_mode():
        ours = network.encoder(mel, torch.tensor([48, 48]))
        output = theirs(mel).last_hidden_state
    assert len(layers_ours) == len(layers_theirs) == config.encoder_layers
    assert max(worst(a, b) for a, b in zip(layers_ours, layers_theirs, strict=True)) < 1e-5
    assert worst(ours, output) < 1e-5
    assert worst(ours[0], ours[1]) > 0.1


# ---- RoPE and the whole encoder, from the specification ----


def rotated(x: Array, num_dims: int) -> Array:
    """x [S, D] with dimensions (0, 1), (2, 3).. below num_dims taken as complex numbers and turned by their angle."""
    pairs = torch.view_as_complex(torch.from_numpy(x[:, :num_dims].reshape(len(x), -1, 2).copy()))
    frequencies = torch.tensor([10000.0 ** (-2 * i / num_dims) for i in range(num_dims // 2)], dtype=torch.float64)
    turns = torch.polar(
        torch.ones(len(x), num_dims // 2, dtype=torch.float64),
        torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies,
    )
    turned: Array = torch.view_as_real(pairs * turns).flatten(-2).numpy()
    return np.concatenate([turned, x[:, num_dims:]], axis=1)


@pytest.mark.parametrize("head_dim", [8, 16, 64])
@pytest.mark.parametrize("num_positions", [1, 50, 1500])
def test_rope_is_a_complex_rotation_of_the_first_half(head_dim: int, num_positions: int) -> None:
    x = np.random.default_rng(0).standard_normal((num_positions, head_dim))
    cos, sin = model.rope_angles(torch.arange(num_positions), head_dim // 2, 10_000.0)
    assert cos.dtype == torch.float32
    ours = model.rotate_interleaved(torch.from_numpy(x).float(), cos, sin)
    assert worst(ours, rotated(x, head_dim // 2)) < 1e-5
    assert torch.equal(ours[:, head_dim // 2 :], torch.from_numpy(x).float()[:, head_dim // 2 :])


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    result: Array = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias
    return result


def gelu(x: Array) -> Array:
    result: Array = np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))), otypes=[float])(x)
    return result


def convolved(x: Array, weight: Array, bias: Array, stride: int) -> Array:
    """Kernel 3, one zero on either side: x [C, T] to [O, T']."""
    framed = np.pad(x, ((0, 0), (1, 1)))
    starts = range(0, framed.shape[1] - 2, stride)
    columns = [np.tensordot(weight, framed[:, start : start + 3], axes=2) + bias for start in starts]
    return np.stack(columns, axis=1)


def reference_encode(weights: dict[str, Array], config: ModelConfig, mel: Array) -> tuple[Array, Array]:
    """Encoder frames [S, E] and audio embeddings [A, H] of one clip [M, F], after spec/model.md section 5."""

    def linear(x: Array, name: str) -> Array:
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", np.zeros(1))

    def normed(x: Array, name: str) -> Array:
        return layer_norm(x, weights[name + ".weight"], weights[name + ".bias"])

    tower = "whisper."
    x = gelu(convolved(mel, weights[tower + "conv1.weight"], weights[tower + "conv1.bias"], 1))
    x = gelu(convolved(x, weights[tower + "conv2.weight"], weights[tower + "conv2.bias"], 2)).T
    width = config.encoder_dim // config.encoder_heads
    for n in range(config.encoder_layers):
        at = f"{tower}layers.{n}."
        y = normed(x, at + "self_attn_layer_norm")
        queries, keys, values = (linear(y, f"{at}self_attn.{part}_proj") for part in "qkv")
        heads = []
        for start in range(0, config.encoder_dim, width):
            head = slice(start, start + width)
            scores = rotated(queries[:, head], width // 2) @ rotated(keys[:, head], width // 2).T / math.sqrt(width)
            exp = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(exp / exp.sum(axis=1, keepdims=True) @ values[:, head])
        x = x + linear(np.concatenate(heads, axis=1), at + "self_attn.out_proj")
        x = x + linear(gelu(linear(normed(x, at + "final_layer_norm"), at + "fc1")), at + "fc2")
    y = normed(x, "layer_norm")
    if len(y) < 4:
        y = np.concatenate([y, np.zeros((4 - len(y), y.shape[1]))])
    groups = np.stack([np.concatenate(list(y[start : start + 4])) for start in range(0, len(y) - 3, 4)])
    return x, linear(gelu(linear(groups, "adapting.0")), "adapting.2")


@pytest.fixture(scope="module")
def wide(small: ModelConfig) -> ModelConfig:
    """Head width 16, so that RoPE turns four pairs at four speeds."""
    return replace(small, encoder_dim=48, encoder_heads=3, encoder_ffn_dim=80)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 6, 7, 8, 9, 15, 31, 64, 101])
def test_encoder_and_adapter_follow_the_specification(wide: ModelConfig, num_frames: int) -> None:
    network = random_network(wide, seed=num_frames)
    weights = {name: tensor.double().numpy() for name, tensor in published(network, "audio_encoder.").items()}
    mel = random_mels(wide.num_mels, (num_frames,), seed=num_frames)[0]
    frames, tokens = reference_encode(weights, wide, mel.double().numpy())
    lengths = torch.tensor([num_frames])
    with torch.inference_mode():
        assert worst(network.encoder(mel[None], lengths)[0], frames) < 1e-5
        assert worst(network.encode(mel[None], lengths)[0], tokens) < 1e-5
    assert len(tokens) == max((num_frames + 1) // 2 // 4, 1)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda v: np.maximum(v, 0)),
        ("selu", lambda v: 1.0507009873554805 * np.where(v > 0, v, 1.6732632423543772 * np.expm1(v))),
    ],
)
def test_other_adapter_activations(small: ModelConfig, name: str, formula: Callable[[Array], Array]) -> None:
    network = random_network(replace(small, adapter_activation=name))
    w = {key: tensor.double().numpy() for key, tensor in published(network, "audio_encoder.").items()}
    x = np.random.default_rng(0).standard_normal((4, small.encoder_dim))
    groups = layer_norm(x, w["layer_norm.weight"], w["layer_norm.bias"]).reshape(1, -1)
    expected = formula(groups @ w["adapting.0.weight"].T + w["adapting.0.bias"])
    expected = expected @ w["adapting.2.weight"].T + w["adapting.2.bias"]
    with torch.inference_mode():
        assert worst(network.adapter(torch.from_numpy(x).float()[None], torch.tensor([4]))[0], expected) < 1e-5


# ---- the prompt, the cache, the batch, the dtypes ----


def test_audio_embeddings_take_the_audio_places_in_order(small: ModelConfig) -> None:
    network = random_network(small)
    a = small.audio_token_id
    ids = torch.tensor([[7, a, a, 8, a, 9], [a, 5, 6, 6, 6, a], [1, 2, 3, 4, 5, 6]])
    audio = torch.arange(3 * 3 * small.hidden_dim).reshape(3, 3, -1).float()
    with torch.inference_mode():
        x = network.embed(ids, audio)
    for row in range(3):
        rest = iter(audio[row])
        for place, token in enumerate(ids[row].tolist()):
            wanted = next(rest) if token == a else network.decoder.embed.weight[token]
            assert torch.equal(x[row, place], wanted)


def test_cached_equals_uncached(small: ModelConfig) -> None:
    """Prefill and steps of unequal rows agree with one forward over each row alone."""
    network = random_network(small)
    prompts, steps = (9, 3, 14), 6
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(n + steps, small.hidden_dim, generator=generator) for n in prompts]
    with torch.inference_mode():
        cache = model.KVCache(small, len(rows), max(prompts) + steps, rows[0])
        x = torch.full((len(rows), max(prompts), small.hidden_dim), 5.0)  # loud padding
        for row, n in zip(range(len(rows)), prompts, strict=True):
            x[row, :n] = rows[row][:n]
        hidden = network.decoder(x, torch.arange(max(prompts)).expand(len(rows), -1), cache)
        got = [[hidden[row, :n]] for row, n in enumerate(prompts)]
        for step in range(steps):
            x = torch.stack([rows[row][n + step] for row, n in enumerate(prompts)])[:, None]
            hidden = network.decoder(x, torch.tensor(prompts)[:, None] + step, cache)
            for row in range(len(rows)):
                got[row].append(hidden[row])
        for row, x in enumerate(rows):
            whole = network.decoder(x[None], torch.arange(len(x))[None])
            assert worst(network.decoder.logits(torch.cat(got[row])), network.decoder.logits(whole[0])) < 1e-5


@pytest.mark.parametrize("use_rope", [True, False])
def test_a_clip_does_not_depend_on_its_batch(small: ModelConfig, use_rope: bool) -> None:
    network = random_network(replace(small, use_rope=use_rope))
    clips = random_mels(small.num_mels)
    mel, num_frames = padded(clips)
    prompts = [prompt_for(small, n, seed=n) for n in LENGTHS]
    ids = torch.full((len(prompts), max(len(p) for p in prompts)), 3)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    with torch.inference_mode():
        frames, tokens = network.encoder(mel, num_frames), network.encode(mel, num_frames)
        logits = network(mel, num_frames, ids)
        for row, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
            alone, length = clip[None], num_frames[row : row + 1]
            alone_frames = network.encoder(alone, length)[0]
            alone_tokens = network.encode(alone, length)[0]
            alone_logits = network(alone, length, torch.tensor([prompt]))[0]
            assert worst(frames[row, : len(alone_frames)], alone_frames) < 1e-5
            assert worst(tokens[row, : len(alone_tokens)], alone_tokens) < 1e-5
            assert worst(logits[row, : len(prompt)], alone_logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(small: ModelConfig, dtype: torch.dtype) -> None:
    network = random_network(small)
    mel, num_frames = padded(random_mels(small.num_mels))
    ids = torch.tensor([prompt_for(small, 77, seed=1)] * len(LENGTHS))
    with torch.inference_mode():
        exact = network(mel, num_frames, ids)
        rough = network.to(dtype)(mel.to(dtype), num_frames, ids)
    assert rough.dtype == dtype
    assert rough.isfinite().all()
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_float16_is_clamped(small: ModelConfig, dtype: torch.dtype) -> None:
    """A feed-forward network that overflows float16 stays finite in it, and is left as it is elsewhere."""
    network = random_network(small)
    first = network.encoder.layers[0]
    assert isinstance(first, model.EncoderLayer)
    with torch.no_grad():
        first.fc1.bias.fill_(100.0)
        first.fc2.weight.mul_(2_000.0)
    network.to(dtype)
    seen: list[Tensor] = []
    first.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.inference_mode():
        tokens = network.encode(random_mels(small.num_mels, (20,))[0][None].to(dtype), torch.tensor([20]))
    assert tokens.isfinite().all()
    assert seen[0].isfinite().all()
    largest = float(seen[0].abs().max())
    assert 60_000 < largest < 65_504 if dtype == torch.float16 else largest > 65_504
