"""The network, executable twin of docs/model.md: Encoder, Adapter, Decoder, and loading and saving of them.

    mel [B, M, F] -> Encoder -> [B, S, E] -> Adapter -> [B, A, H] -> prompt embeddings [B, P, H] -> Decoder -> [B, P, V]

B clips, M mels, F mel frames (100 Hz), S encoder frames (50 Hz), E encoder width, A audio tokens (12.5 Hz), H decoder
width, P prompt positions, V vocabulary, N heads, D head width.

Unusual: the encoder has no position embedding but rotates the first half of each head's dimensions in interleaved
pairs; padded frames are masked everywhere, so that a clip's numbers do not depend on the batch it is in.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from arkasr import checkpoint, files
from arkasr import config as configs
from arkasr.checkpoint import Checkpoint
from arkasr.config import ENCODER_ROPE_THETA, LAYER_NORM_EPS, ModelConfig

REOPEN_BYTES = 2**27
FP16_LIMIT = 65504.0 - 1000.0
See = Callable[[int, Tensor], object]  # takes a decoder layer's number and its rotated queries [B, N, T, D]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "selu": F.selu}


def rope_angles(positions: Tensor, num_dims: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cos and sin of position * theta^(-2i / num_dims), [..., num_dims / 2], float32 (RoFormer, arXiv 2104.09864).

    The angles are float64: in float32 half a unit in the last place is already 6e-5 radians at 30 s of frames.
    """
    exponents = torch.arange(0, num_dims, 2, device=positions.device, dtype=torch.float64) / num_dims
    angles = positions.double()[..., None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension 2i with 2i+1 over the first 2 * cos.shape[-1] dimensions of x [..., D]; the rest pass."""
    num_dims = 2 * cos.shape[-1]
    even, odd = x[..., :num_dims:2], x[..., 1:num_dims:2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((rotated, x[..., num_dims:]), dim=-1)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension i with i + D/2 of x [..., D], as Qwen2 does."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class EncoderLayer(nn.Module):
    """Pre-norm Whisper layer with optional partial RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.num_heads = config.encoder_heads
        self.attention_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(dim, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """X [B, S, E]; rope cos and sin [S, D/4] or None; mask [B, 1, 1, S], True where a frame may be attended."""
        normed = self.attention_norm(x)
        q, k, v = (
            linear(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        if rope is not None:
            q, k = rotate_interleaved(q, *rope), rotate_interleaved(k, *rope)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, N, S, D]
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        x = x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))
        if x.dtype == torch.float16:
            x = x.clamp(-FP16_LIMIT, FP16_LIMIT)
        return x


class Encoder(nn.Module):
    """Whisper's conv stem and layers, without its final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.use_rope = config.use_rope
        self.rope_dims = config.encoder_head_dim // 2
        self.conv1 = nn.Conv1d(config.num_mels, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, kernel_size=3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.zeros(config.max_encoder_frames, dim), requires_grad=not config.use_rope)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, mel: Tensor, num_frames: Tensor) -> Tensor:
        """Mel [B, M, F], zero beyond each clip's num_frames [B]; returns [B, S, E], S = (F + 1) // 2."""
        x = F.gelu(self.conv1(mel))
        padded = bool((num_frames < mel.shape[-1]).any())
        if padded:
            # A clip alone has zeros here, its neighbour's padding would have gelu(bias).
            x = x * frame_mask(num_frames, x.shape[-1])[:, None, :]
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # [B, S, E]
        num_positions = x.shape[1]
        mask = frame_mask(num_encoder_frames(num_frames), num_positions)[:, None, None, :] if padded else None
        rope = None
        if self.use_rope:
            positions = torch.arange(num_positions, device=x.device)
            cos, sin = rope_angles(positions, self.rope_dims, ENCODER_ROPE_THETA)
            rope = cos.to(x.dtype), sin.to(x.dtype)
        else:
            x = x + self.positions[:num_positions]
        for layer in self.layers:
            x = layer(x, rope, mask)
        return x


class Adapter(nn.Module):
    """LayerNorm, then `merge_factor` consecutive frames to one decoder embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.merge_factor = config.merge_factor
        self.activation = config.adapter_activation
        self.norm = nn.LayerNorm(config.encoder_dim, eps=LAYER_NORM_EPS)
        self.up = nn.Linear(config.merge_factor * config.encoder_dim, 2 * config.hidden_dim)
        self.down = nn.Linear(2 * config.hidden_dim, config.hidden_dim)

    def forward(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """Frames [B, S, E], valid up to num_frames [B]; returns [B, A, H], A = max(S // merge, 1)."""
        merge = self.merge_factor
        x = self.norm(frames)
        if bool((num_frames < max(merge, x.shape[1])).any()):
            x = x * frame_mask(num_frames, x.shape[1])[:, :, None]  # a clip below one group is filled up with zeros
        if x.shape[1] < merge:
            x = F.pad(x, (0, 0, 0, merge - x.shape[1]))
        x = x[:, : x.shape[1] // merge * merge].reshape(x.shape[0], -1, merge * x.shape[2])
        merged: Tensor = self.down(_ACTIVATIONS[self.activation](self.up(x)))
        return merged


class Cache(Protocol):
    """Keeps keys and values between calls; `capacity` is how many positions of a row its `put` returns."""

    capacity: int

    def put(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v [B, kv heads, T, D] of positions [B, T]; returns all keys and values of the layer."""
        ...


class KVCache:
    """Keys and values of every decoder layer, [layers, B, kv heads, capacity, D], filled per row."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        """Room for `capacity` positions a row, in the dtype and on the device of `like`."""
        shape = (config.decoder_layers, batch, config.kv_heads, capacity, config.decoder_head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.capacity = capacity

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, [n], in their order; one named twice is copied."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)

    def put(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, kv heads, T, D] at positions [B, T]; returns all keys and values of the layer."""
        index = positions[:, None, :, None].expand_as(k)
        keys, values = self.keys[layer], self.values[layer]
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys, values


class DecoderLayer(nn.Module):
    """Qwen2 layer: RMSNorm, grouped-query attention with RoPE, SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, kv_dim = config.hidden_dim, config.kv_heads * config.decoder_head_dim
        self.head_dim = config.decoder_head_dim
        self.attention_norm = nn.RMSNorm(dim, eps=config.rms_eps)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, kv_dim)
        self.v = nn.Linear(dim, kv_dim)
        self.o = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = nn.RMSNorm(dim, eps=config.rms_eps)
        self.gate = nn.Linear(dim, config.decoder_ffn_dim, bias=False)
        self.up = nn.Linear(dim, config.decoder_ffn_dim, bias=False)
        self.down = nn.Linear(config.decoder_ffn_dim, dim, bias=False)

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B, heads, T, D]."""
        normed = self.attention_norm(x)
        q, k, v = (
            linear(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        return rotate_halves(q, *rope), rotate_halves(k, *rope), v

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
        positions: Tensor,
        see: See | None = None,
    ) -> Tensor:
        """X [B, T, H]; mask [B, 1, T, keys] or None for plain causal attention over x itself."""
        q, k, v = self.attend(x, rope)
        if see is not None:
            see(layer, q)
        if cache is not None:
            k, v = cache.put(layer, positions, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        normed = self.ffn_norm(x)
        result: Tensor = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return result


class Embedding(nn.Embedding):
    """On meta there is nothing to initialise, and torch's `normal_` there imports 800 modules: a second a start."""

    def reset_parameters(self) -> None:
        """Random rows, where there is memory for them."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    """Qwen2: embeddings in, logits out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.decoder_head_dim, config.rope_theta
        self.embed = Embedding(config.vocab_size, config.hidden_dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.RMSNorm(config.hidden_dim, eps=config.rms_eps)
        self.head: nn.Linear | None = None
        if not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        see: See | None = None,
    ) -> Tensor:
        """Hidden states [B, T, H] of embeddings x [B, T, H] at positions [B, T].

        Without a cache the rows are right-padded and attention is causal. With a cache, keys of earlier calls take
        part: a row attends to every cached position up to its own. A `mask` [B, 1, T, keys] replaces both rules.
        `see` is shown the queries of every layer.
        """
        cos, sin = rope_angles(positions, self.head_dim, self.rope_theta)
        rope = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [B, 1, T, D/2]
        if cache is not None and mask is None:
            keys = torch.arange(cache.capacity, device=x.device)
            mask = keys <= positions[:, None, :, None]  # [B, 1, T, capacity]
        for n, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, n, positions, see)
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token, [..., V], of hidden states [..., H]."""
        return F.linear(hidden, self.embed.weight if self.head is None else self.head.weight)


class ArkASR(nn.Module):
    """The whole recognizer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.adapter = Adapter(config)
        self.decoder = Decoder(config)

    def encode(self, mel: Tensor, num_frames: Tensor) -> Tensor:
        """Audio embeddings [B, A, H] of mel [B, M, F]; row b is valid up to its own number of audio tokens."""
        return self.adapter(self.encoder(mel, num_frames), num_encoder_frames(num_frames))  # type: ignore[no-any-return]

    def embed(self, ids: Tensor, audio: Tensor) -> Tensor:
        """Embeddings [B, T, H] of ids [B, T] whose `<|audio|>` places take, in order, the rows of audio [B, A, H]."""
        x = self.decoder.embed(ids)
        places = ids == self.config.audio_token_id
        order = (places.cumsum(dim=1) - 1).clamp(min=0)  # [B, T]: which audio token stands there
        spread = audio.to(x.dtype).gather(1, order[..., None].expand(-1, -1, audio.shape[-1]))
        return torch.where(places[..., None], spread, x)

    def forward(self, mel: Tensor, num_frames: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of right-padded ids [B, T] after the audio: training and parity tests."""
        x = self.embed(ids, self.encode(mel, num_frames))
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.decoder.logits(self.decoder(x, positions))


def num_encoder_frames(num_frames: Tensor) -> Tensor:
    """Encoder frames [B] of num_frames [B] mel frames: conv2's stride."""
    return (num_frames + 1) // 2


def frame_mask(num_frames: Tensor, length: int) -> Tensor:
    """[B, length], True before each row's num_frames [B]."""
    return torch.arange(length, device=num_frames.device) < num_frames[:, None]


def load(source: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ArkASR:
    """The model of an opened checkpoint, in inference mode; weights are read once, memory-mapped, tensor by tensor."""
    checkpoint.need_weights(source)
    checkpoint.check_tied_head(source)
    with torch.device("meta"):
        model = ArkASR(source.config)
    ours = {spec.hf_name: spec.name for spec in checkpoint.tensor_specs(source.config)}
    state: dict[str, Tensor] = {}
    for shard in source.shards:
        for hf_name, tensor in _read(shard, set(ours), dtype, device):
            state[ours[hf_name]] = tensor
    if "encoder.positions" not in state:
        shape = model.encoder.positions.shape
        state["encoder.positions"] = torch.zeros(shape, dtype=dtype, device=device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _read(shard: Path, wanted: set[str], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of a file: its mapped pages where dtype and device are the file's, else copies.

    Pages that were copied count as this process's memory until the file is closed, so it is opened anew now and then.
    """
    with safe_open(shard, framework="pt") as file:
        names = [name for name in file.offset_keys() if name in wanted][::-1]  # as they lie on the disk
    while names:
        copied_bytes = 0
        with safe_open(shard, framework="pt", device=device) as file:
            while names and copied_bytes < REOPEN_BYTES:
                stored = file.get_tensor(names[-1])
                tensor = stored.to(dtype)
                copied_bytes += 0 if tensor is stored and device == "cpu" else stored.nbytes
                yield names.pop(), tensor


def published_tensors(model: ArkASR, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under their published names."""
    state = model.state_dict()
    for spec in checkpoint.tensor_specs(model.config):
        yield spec.hf_name, state[spec.name].detach().to("cpu", dtype).contiguous()


def save(model: ArkASR, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors in the published layout, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(published_tensors(model, dtype))
    config = json.dumps(configs.to_mapping(model.config), indent=2) + "\n"
    files.write_atomically(folder / files.WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    files.write_atomically(folder / files.CONFIG, lambda part: part.write_text(config, encoding="utf-8"))
