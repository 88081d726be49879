"""How puppets speak: espeak-ng voices with phoneme timings, and the mouth that goes with them.

espeak-ng tells when each phoneme starts. A phoneme belongs to one of `PHONEME_CLASSES`, a class has a mouth shape;
shapes are held for the phoneme's time, scaled mildly by loudness and smoothed as a mouth moves (Gaussian, sigma 40
ms).
"""

import ctypes
import dataclasses
import functools
import os
import threading
from _ctypes import dlclose

import numpy as np
import soxr
from jaxtyping import Float, Int

from mi_jax.puppets.sentences import TEST, TRAIN, WIDE, Grammar, sentence
from mi_jax.rates import FPS, SAMPLE_RATE

# class: (opening, width factor, roundness). Below zero: pressed shut long enough that smoothing leaves it closed.
_SHAPES: dict[str, tuple[float, float, float]] = {
    "silence": (-0.1, 1.0, 0.0),
    "m b p": (-0.8, 1.0, 0.0),
    "f v": (0.02, 1.05, 0.0),
    "th": (0.24, 1.05, 0.0),
    "t d n l": (0.26, 1.06, 0.0),
    "s z": (0.16, 1.14, 0.0),
    "sh": (0.26, 0.82, 0.7),
    "k g h": (0.36, 1.0, 0.1),
    "r": (0.32, 0.9, 0.4),
    "w": (0.14, 0.62, 1.0),
    "a": (1.05, 1.04, 0.25),
    "e": (0.66, 1.16, 0.05),
    "i": (0.36, 1.26, 0.0),
    "o": (0.78, 0.74, 1.0),
    "u": (0.34, 0.6, 1.0),
    "schwa": (0.52, 1.0, 0.25),
}
PHONEME_CLASSES: tuple[str, ...] = tuple(_SHAPES)
SILENCE, BILABIAL, OPEN = (PHONEME_CLASSES.index(name) for name in ("silence", "m b p", "a"))

_IPA = {
    "m b p": "mbpɓɸβʙ", "f v": "fvʋɱⱱ", "th": "θð", "t d n l": "tdnlɾɖʈɳɭɫɬɮɗʟ", "s z": "sz", "sh": "ʃʒɕʑʂʐ",
    "k g h": "kɡgŋxɣχhɦqɢʔħʕcɟɲçʝʎɴ", "r": "rɹʁɻʀɽɺ", "w": "wʍɥɰ", "a": "aɑäɐʌæɶ", "e": "eɛ", "i": "iɪɨjɯʲ",
    "o": "oɔɒøœɞ",
    "u": "uʊyʏʉ", "schwa": "əɚɜɝɘɵɤᵻ",
}  # fmt: skip
_CLASS_OF = {symbol: PHONEME_CLASSES.index(name) for name, symbols in _IPA.items() for symbol in symbols}

# Training and test share neither an espeak-ng voice nor a variant of the throat; nor do "wide" and test. Variants with
# breath or Klatt synthesis are left out: their noise differs from run to run.
_VARIANTS: dict[str, tuple[str, ...]] = {
    "train": ("", "+m1", "+m2", "+m3", "+m4", "+m7", "+f1", "+f4", "+linda", "+steph", "+rob", "+belinda", "+Annie",
              "+Alex", "+boris", "+benjamin"),
    "test": ("+m5", "+m6", "+m8", "+Andrea", "+Mike", "+anika", "+aunty"),
}  # fmt: skip
_VARIANTS["wide"] = _VARIANTS["train"] + (
    "+Andy", "+AnxiousAndy", "+Denis", "+Diogo", "+Gene", "+Gene2", "+Henrique", "+Hugo", "+Jacky", "+Lee", "+Marco",
    "+Mario", "+Michael", "+Nguyen", "+Tweaky", "+antonio", "+croak", "+ed", "+grandma", "+grandpa", "+gustave", "+ian",
    "+iven", "+iven2", "+iven3", "+iven4", "+john", "+kaukovalta", "+marcelo", "+max", "+michel", "+miguel", "+norbert",
    "+pablo", "+paul", "+pedro", "+quincy", "+robert", "+shelby", "+steph2", "+steph3", "+travis", "+zac",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voice:
    """One way to speak."""

    language: str
    name: str  # espeak-ng voice + variant
    pitch: int  # 0..99
    pitch_range: int
    words_per_minute: int
    noise: float  # level of the background noise, 0 for none
    level: float  # loudness (RMS) of the speech


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speech:
    """Sound [n] at 16 kHz in [-1, 1], its phonemes (start s, end s, class) without gaps, and what was said."""

    audio: Float[np.ndarray, "n"]
    phonemes: list[tuple[float, float, int]]
    text: str
    voice: Voice


def _grammars(split: str) -> dict[str, Grammar]:
    return {"train": TRAIN, "test": TEST, "wide": WIDE}[split]


def voices(split: str) -> set[str]:
    """All espeak-ng voices of a split."""
    return {name + v for g in _grammars(split).values() for name in g.voices for v in _VARIANTS[split]}


def sample_voice(rng: np.random.Generator, split: str, throats: str | None = None) -> Voice:
    """A random voice of "train", "test" or "wide": the training voices and many others, for those who only listen.

    throats: the split whose variants of the throat are taken, where they are not those of the language's.
    """
    variants = _VARIANTS[throats or split]
    grammars = _grammars(split)
    names = list(grammars)
    language = names[int(rng.integers(len(names)))]
    own = grammars[language].voices
    variant = variants[int(rng.integers(len(variants)))]
    return Voice(
        language=language, name=own[int(rng.integers(len(own)))] + variant, pitch=int(rng.integers(25, 78)),
        pitch_range=int(rng.integers(30, 75)), words_per_minute=int(rng.integers(125, 186)),
        noise=float(10 ** rng.uniform(-2.9, -2.0)) if rng.random() < 0.2 else 0.0,
        level=float(10 ** rng.uniform(-1.35, -0.95)),
    )  # fmt: skip


def speak(rng: np.random.Generator, voice: Voice, seconds: float, split: str) -> Speech:
    """Sentences with pauses, exactly `seconds` long; the same bits for the same generator, whatever was said before."""
    grammar = _grammars(split)[voice.language]
    lead = rng.uniform(0.4, 1.1) if rng.random() < 0.18 else rng.uniform(0.03, 0.22)
    now, texts, chunks, phonemes = 0.0, [], [], [(0.0, lead, SILENCE)]
    chunks.append(np.zeros(int(lead * _ESPEAK_RATE), np.float32))
    now = len(chunks[0]) / _ESPEAK_RATE
    with _engine(voice) as say:
        while now < seconds:
            for phrase in sentence(rng, grammar):
                sound, events = say(phrase)
                start = now
                for (at, symbol), (until, _) in zip(events, [*events[1:], (len(sound) / _ESPEAK_RATE, "")]):
                    phonemes.extend((start + a, start + b, c) for a, b, c in _split(symbol, at, until))
                chunks.append(sound)
                now += len(sound) / _ESPEAK_RATE
                pause = rng.uniform(0.05, 0.3) if phrase[-1] not in ".?" else rng.uniform(0.15, 0.75)
                quiet = np.zeros(int(pause * _ESPEAK_RATE), np.float32)
                chunks.append(quiet)
                phonemes.append((now, now + len(quiet) / _ESPEAK_RATE, SILENCE))
                now += len(quiet) / _ESPEAK_RATE
                texts.append(phrase)
                if now >= seconds:
                    break
    count = round(seconds * SAMPLE_RATE)
    audio = soxr.resample(np.concatenate(chunks), _ESPEAK_RATE, SAMPLE_RATE, quality="HQ")[:count]
    loud = np.abs(audio) > 0.01
    audio = audio * (voice.level / max(1e-4, float(np.sqrt(np.mean(audio[loud] ** 2))) if loud.any() else 1.0))
    audio = np.pad(audio, (0, count - len(audio)))
    if voice.noise:
        hiss = rng.standard_normal(count).astype(np.float32)
        hiss = np.convolve(hiss, np.exp(-np.arange(24) / rng.uniform(0.6, 6.0)).astype(np.float32), mode="same")
        audio = audio + voice.noise * hiss / np.sqrt(np.mean(hiss**2))
    audio = np.clip(audio, -1, 1).astype(np.float32)
    merged: list[tuple[float, float, int]] = []
    for start, end, kind in phonemes:
        start, end = (merged[-1][1] if merged else 0.0), min(end, seconds)
        if end - start > 1e-6:
            if merged and merged[-1][2] == kind == SILENCE:
                merged[-1] = (merged[-1][0], end, kind)
            else:
                merged.append((start, end, kind))
    return Speech(audio=audio, phonemes=merged, text=" ".join(texts), voice=voice)


def _split(symbol: str, start, end) -> list[tuple[float, float, int]]:
    """A phoneme in IPA as its parts: diphthongs and affricates share its time, a length mark adds to its vowel."""
    kinds, weights = [], []
    for character in symbol:
        if character == "ː" and kinds:
            weights[-1] += 1.0
        elif character in _CLASS_OF:
            kinds.append(_CLASS_OF[character])
            weights.append(1.0)
    if not kinds:
        kinds, weights = [SILENCE], [1.0]
    edges = start + (end - start) * np.concatenate([[0], np.cumsum(weights)]) / sum(weights)
    return [(float(a), float(b), k) for a, b, k in zip(edges[:-1], edges[1:], kinds)]


def mouth_track(speech: Speech, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Opening 0..1, width factor and roundness of the mouth, each [f], in the middle of frame f, (f + 0.5) / 25 s."""
    rate, sigma = 200, 0.04
    count = frames * rate // FPS
    time = (np.arange(count) + 0.5) / rate
    shapes = np.array(list(_SHAPES.values()))
    starts = np.array([p[0] for p in speech.phonemes])
    kinds = np.array([p[2] for p in speech.phonemes])
    target = shapes[kinds[np.clip(np.searchsorted(starts, time, side="right") - 1, 0, None)]]
    step = SAMPLE_RATE // rate
    power = np.pad(speech.audio.astype(np.float64), (0, max(0, count * step - len(speech.audio))))[: count * step] ** 2
    loudness = np.sqrt(_smooth(power.reshape(count, step).mean(1), 0.025 * rate))
    loudness = np.clip(loudness / max(1e-6, np.quantile(loudness, 0.95)), 0, 1)
    factor = np.where(target[:, 0] > 0, 0.78 + 0.27 * np.sqrt(loudness), 1.0)
    opening = np.clip(1.12 * _smooth(target[:, 0] * factor, sigma * rate), 0, 1)
    wide, round_ = (_smooth(target[:, k], sigma * rate) for k in (1, 2))
    middle = ((np.arange(frames) + 0.5) * rate / FPS).astype(int)
    return opening[middle], wide[middle], round_[middle]


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(4 * sigma) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


def phoneme_steps(phonemes: list[tuple[float, float, int]], frames: int) -> Int[np.ndarray, "m"]:
    """The class in the middle of each 20 ms step: step n covers n * 20 .. (n + 1) * 20 ms, two to a frame."""
    middle = (np.arange(2 * frames) + 0.5) * 0.02
    starts = np.array([p[0] for p in phonemes])
    kinds = np.array([p[2] for p in phonemes], np.int32)
    return kinds[np.clip(np.searchsorted(starts, middle, side="right") - 1, 0, None)]


# --- espeak-ng through ctypes ---

_ESPEAK_RATE = 22_050
_SYNCHRONOUS, _PHONEME_EVENTS_IN_IPA, _UTF8, _EVENT_PHONEME = 2, 3, 1, 7
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_lock = threading.Lock()


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@functools.cache
def _library_paths() -> tuple[str, str]:
    import espeakng_loader

    return espeakng_loader.get_library_path(), os.path.dirname(espeakng_loader.get_data_path())


class _engine:
    """A freshly loaded espeak-ng with a voice set, as a context: `say(text)` -> (sound at 22.05 kHz, [(start s, IPA),
    ...]).

    The library keeps hidden state (flutter, wave phase) that even espeak_Terminate does not reset, so
    the same text would sound different the second time. Loading it anew costs about 3 ms and makes speech a pure
    function of its arguments. One engine at a time: espeak-ng is not thread-safe.
    """

    def __init__(self, voice: Voice):
        self.voice = voice

    def __enter__(self):
        _lock.acquire()
        library, data = _library_paths()
        self.library = ctypes.CDLL(library)
        if self.library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _PHONEME_EVENTS_IN_IPA) != _ESPEAK_RATE:
            self.__exit__()
            raise RuntimeError(f"espeak-ng did not start from {data}")
        self.sound: list[np.ndarray] = []
        self.events: list[tuple[float, str]] = []
        self.callback = _CALLBACK(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)
        if self.library.espeak_SetVoiceByName(self.voice.name.encode()) != 0:
            self.__exit__()
            raise RuntimeError(f"espeak-ng has no voice {self.voice.name}")
        for parameter, value in (
            (_RATE, self.voice.words_per_minute),
            (_VOLUME, 100),
            (_PITCH, self.voice.pitch),
            (_RANGE, self.voice.pitch_range),
        ):
            self.library.espeak_SetParameter(parameter, value, 0)
        return self._say

    def __exit__(self, *_):
        self.library.espeak_Terminate()
        handle = self.library._handle
        del self.library
        dlclose(handle)
        _lock.release()

    def _receive(self, wave, count, event) -> int:
        if wave and count:
            self.sound.append(np.ctypeslib.as_array(wave, (count,)).astype(np.float32) / 32768)
        index = 0
        while event[index].type != 0:
            if event[index].type == _EVENT_PHONEME:
                self.events.append(
                    (event[index].audio_position / 1000, event[index].id.string.decode("utf-8", "ignore"))
                )
            index += 1
        return 0

    def _say(self, text: str) -> tuple[np.ndarray, list[tuple[float, str]]]:
        self.sound.clear()
        self.events.clear()
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 0, 0, _UTF8, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.sound), list(self.events)
