"""Prepares the training of `tiny`: manifests with phones, synthetic speech, a small tokenizer, a random checkpoint.

    python runs/tiny_data.py SPEECH_FOLDER WORK_FOLDER

Reads AN4; speaks random phrases of the domain with Debian's espeak-ng and flite (both must be installed). Phones, the
targets of the auxiliary CTC head, come from flite. Everything follows from SEED.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from arkasr import audio, checkpoint, model, text
from arkasr.audio import Waveform
from arkasr.config import ModelConfig
from arkasr.data import read_manifest

SEED = 20261122
NUM_SYNTHETIC = 9000
NUM_SHORT = 4000  # single words and pairs, cut tightly, as single-word recordings are
VOCABULARY = 700  # before the added tokens

DIGITS = ["ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"]
TEENS = [
    "TEN", "ELEVEN", "TWELVE", "THIRTEEN", "FOURTEEN", "FIFTEEN", "SIXTEEN", "SEVENTEEN", "EIGHTEEN", "NINETEEN",
]  # fmt: skip
TENS = ["TWENTY", "THIRTY", "FORTY", "FIFTY", "SIXTY", "SEVENTY", "EIGHTY", "NINETY"]
MONTHS = [
    "JANUARY", "FEBRUARY", "MARCH", "APRIL", "MAY", "JUNE", "JULY", "AUGUST", "SEPTEMBER", "OCTOBER", "NOVEMBER",
    "DECEMBER",
]  # fmt: skip
ORDINALS = [
    "FIRST", "SECOND", "THIRD", "FOURTH", "FIFTH", "SIXTH", "SEVENTH", "EIGHTH", "NINTH", "TENTH", "ELEVENTH",
    "TWELFTH", "THIRTEENTH", "FOURTEENTH", "FIFTEENTH", "SIXTEENTH", "SEVENTEENTH", "EIGHTEENTH", "NINETEENTH",
    "TWENTIETH", "THIRTIETH",
]  # fmt: skip
COMMANDS = ["YES", "NO", "GO", "STOP", "START", "REPEAT", "HELP", "ENTER", "ERASE", "RUBOUT"]
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
OTHERS = ["OH", "HUNDRED", "THOUSAND", "AND", "OF", "HALF", "APOSTROPHE", "AREA", "CODE"]
WORDS = [*LETTERS, *DIGITS, *TEENS, *TENS, *MONTHS, *ORDINALS, *COMMANDS, *OTHERS]

ESPEAK_LANGUAGES = ("en-us", "en-us", "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-us-nyc", "en-029")
ESPEAK_VARIANTS = (
    "", "+f1", "+f2", "+f3", "+f4", "+f5", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+m8",
    "+Alex", "+Alicia", "+Andrea", "+Andy", "+Annie", "+Diogo", "+Gene", "+Lee", "+linda", "+max", "+Michael",
    "+steph", "+travis", "+victor", "+klatt", "+klatt4", "+belinda", "+david",
)  # fmt: skip
FLITE_VOICES = ("slt", "slt", "rms", "rms", "awb", "kal16")


def number(rng: random.Random) -> list[str]:
    """A spoken number below 10 000."""
    below_100 = rng.choice(
        [[rng.choice(DIGITS)], [rng.choice(TEENS)], [rng.choice(TENS)], [rng.choice(TENS), rng.choice(DIGITS[1:])]]
    )
    match rng.randrange(6):
        case 0:
            return [rng.choice(DIGITS[1:]), "HUNDRED", "AND", *below_100]
        case 1:
            return [rng.choice(DIGITS[1:]), "THOUSAND", rng.choice(DIGITS[1:]), "HUNDRED", "AND", *below_100]
        case 2:
            return [rng.choice(TENS), rng.choice(DIGITS[1:]), *below_100]
        case _:
            return below_100


def phrase(rng: random.Random) -> list[str]:  # noqa: PLR0911
    """A random phrase of the domain. Mostly random strings: nothing in them can be guessed without listening."""
    letters = rng.choices(LETTERS, k=rng.choice([1, 1, 2, 2, 3, 3, 4, 5, 6, 8]))
    digits = rng.choices([*DIGITS, "OH"], k=rng.choice([1, 1, 2, 3, 4, 5, 7]))
    match rng.randrange(10):
        case 0 | 1 | 2:
            return letters
        case 3 | 4:
            return digits
        case 5:
            return [rng.choice(WORDS)]
        case 6:
            return [rng.choice(COMMANDS[-3:]), *letters[:5], *rng.choice([digits[:4], number(rng)])]
        case 7:
            day = rng.choice([[rng.choice(ORDINALS)], [rng.choice(TENS[:2]), rng.choice(ORDINALS[:9])]])
            return [rng.choice(MONTHS), *day, "NINETEEN", rng.choice(TENS), rng.choice(DIGITS[1:])][
                : rng.choice([2, 3, 5, 5])
            ]
        case 8:
            return rng.choices(WORDS, k=rng.randint(1, 6))
        case _:
            return number(rng)


def spoken(words: list[str], rng: random.Random) -> str:
    """The phrase as a synthesizer must be asked: letters by their names, pauses here and there."""
    parts = []
    for word in words:
        said = "rub out" if word == "RUBOUT" else word if len(word) == 1 else word.lower()
        pause = "," if word == "A" or rng.random() < 0.25 else ""
        parts.append(said + pause)
    return " ".join(parts)


def flite_phones(said: str) -> list[str]:
    """CMU phones of a text as flite pronounces it, without pauses."""
    command = ["flite", "-t", said, "-ps", "-o", "none"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [phone for phone in printed if phone != "pau"]


@cache
def word_phones(word: str) -> tuple[str, ...]:
    """Phones of one domain word."""
    return tuple(flite_phones(spoken([word], random.Random(0)).replace(",", "")))


def phrase_units(words: list[str]) -> str:
    """The manifest's `units` of a phrase."""
    return " ".join(phone for word in words for phone in word_phones(word))


def trimmed(samples: Waveform) -> Waveform:
    """Without the silence around it, but 20 ms."""
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    margin = audio.SAMPLE_RATE // 50
    return samples[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else samples


def speak(folder: Path, index: int) -> dict[str, object]:
    """Synthesize utterance number `index`, a short one from NUM_SYNTHETIC on; returns its record."""
    rng = random.Random(SEED * 1_000_003 + index)
    short = index >= NUM_SYNTHETIC
    words = rng.choices(rng.choice([DIGITS, LETTERS, WORDS]), k=rng.choice([1, 1, 1, 2])) if short else phrase(rng)
    said = spoken(words, rng)
    raw, final = folder / f"{index:05}.wav", folder / f"{index:05}.flac"
    if rng.random() < 0.6:
        voice = rng.choice(ESPEAK_LANGUAGES) + rng.choice(ESPEAK_VARIANTS)
        speed, pitch = rng.randint(110, 200), rng.randint(20, 80)
        command = [
            "espeak-ng",
            "-v",
            voice,
            "-s",
            str(speed),
            "-p",
            str(pitch),
            "-g",
            str(rng.randint(0, 6)),
            "-w",
            str(raw),
            said,
        ]
    else:
        voice = rng.choice(FLITE_VOICES)
        f0 = rng.randint(150, 240) if voice == "slt" else rng.randint(85, 150)
        stretch = rng.uniform(0.85, 1.4)
        command = [
            "flite",
            "-voice",
            voice,
            "--setf",
            f"duration_stretch={stretch:.2f}",
            "--setf",
            f"int_f0_target_mean={f0}",
        ]
        command += ["-t", said, "-o", str(raw)]
    subprocess.run(command, check=True, capture_output=True)
    samples, rate = soundfile.read(raw, dtype="float32")
    raw.unlink()
    samples = soxr.resample(samples, rate, audio.SAMPLE_RATE)
    samples = trimmed(samples) if short else samples
    soundfile.write(final, samples, audio.SAMPLE_RATE)
    units = phrase_units(words)
    return {
        "audio": str(final.resolve()), "text": " ".join(words), "units": units, "speaker": voice, "language": "en",
        "duration": round(len(samples) / audio.SAMPLE_RATE, 3), "source": "espeak-ng, flite (synthetic)",
    }  # fmt: skip


def write_manifest(path: Path, records: Iterator[dict[str, object]] | list[dict[str, object]]) -> None:
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    part.rename(path)
    print(path, sum(1 for _ in path.open()), "records")


def an4(speech: Path, split: str) -> Iterator[dict[str, object]]:
    for u in read_manifest(speech / "an4/manifest.jsonl", split=split):
        units = phrase_units(u.text.split())
        yield {
            "audio": str(u.audio.resolve()),
            "text": u.text,
            "units": units,
            "duration": u.duration_s,
            "language": "en",
        }


def tokenizer(phrases: list[str]) -> Tokenizer:
    """A byte-level BPE like Qwen2's, small, with the same added tokens by name; common words become one token."""
    bpe = Tokenizer(models.BPE())
    text.configure_byte_level(bpe)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(phrases, trainer)
    for token in ("<|endoftext|>", "<|im_start|>", text.IM_END, text.AUDIO, text.USER, text.BEGIN_OF_AUDIO,
                  text.END_OF_AUDIO, text.ASSISTANT, text.SYSTEM):  # fmt: skip
        bpe.add_tokens([AddedToken(token, normalized=False, special=True)])
    return bpe


def random_checkpoint(folder: Path, bpe: Tokenizer) -> None:
    ids = bpe.get_vocab()
    config = ModelConfig(
        num_mels=80, encoder_dim=144, encoder_layers=6, encoder_heads=4, encoder_ffn_dim=576, max_encoder_frames=1500,
        use_rope=True, merge_factor=4, adapter_activation="gelu", hidden_dim=128, decoder_layers=2, decoder_heads=4,
        kv_heads=2, decoder_ffn_dim=384, vocab_size=bpe.get_vocab_size(), tied_embeddings=True, rope_theta=1e6,
        rms_eps=1e-6, audio_token_id=ids[text.AUDIO], bos_token_id=ids["<|endoftext|>"],
        eos_token_ids=(ids[text.IM_END],), pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    torch.manual_seed(SEED)
    network = model.ArkASR(config)
    torch.nn.init.normal_(network.decoder.embed.weight, std=0.1)
    # The front end's features have mean -0.2 and deviation 0.45 on speech; let the first layer see 0 and 1.
    with torch.no_grad():
        conv = network.encoder.conv1
        conv.weight /= 0.45
        assert conv.bias is not None
        conv.bias += 0.2 * conv.weight.sum(dim=(1, 2))
    model.save(network, folder, dtype=torch.float32)
    bpe.save(str(folder / "tokenizer.json"))
    checkpoint.open_checkpoint(folder)
    print(folder, sum(p.numel() for p in network.parameters()), "parameters")


def main(speech: Path, work: Path) -> None:
    folder = work / "synthetic"
    folder.mkdir(parents=True, exist_ok=True)
    for word in WORDS:
        word_phones(word)
    write_manifest(work / "an4.jsonl", an4(speech, "train"))
    write_manifest(work / "an4_test.jsonl", an4(speech, "test"))
    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(lambda index: speak(folder, index), range(NUM_SYNTHETIC + NUM_SHORT)))
    write_manifest(work / "synthetic.jsonl", records[:NUM_SYNTHETIC])
    write_manifest(work / "short.jsonl", records[NUM_SYNTHETIC:])
    rng = random.Random(SEED)
    phrases = [" ".join(phrase(rng)) for _ in range(20_000)]
    phrases += [" ".join(rng.sample(WORDS, 8)) for _ in range(5_000)]
    random_checkpoint(work / "start", tokenizer(phrases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
