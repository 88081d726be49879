"""The puppets' tokenizer: one word, one id, in the same file format as the large models' tokenizers.

The puppet model knows the words of the puppets' prompts and some common ones that it has learnt to pass over. A word
that it never saw is read as a word of the same meaning that it knows (`SYNONYMS`), else as [UNK].
"""

import re
from collections.abc import Iterable
from typing import Any

from mi_jax.models.prompts import IMAGE_TOKEN, PUPPET_TOKENS

TEMPLATE_WORDS = ("direction",)

_COMMON = (
    "about actor actress adult also another anyone are as audience avatar be beautiful been being boy by camera "
    "cartoon character child clip close closeup colleague day during each elderly every face female film for "
    "friend front gentleman girl good guy hair has have he head her here herself him himself his human i if "
    "indoors interview it its just kid lady large light listener little long made male man me microphone middle "
    "moment news now old one or our outdoors outside people person photo picture podcast portrait presenter "
    "quality reading real scene shirt short shot she showing small so some somebody someone speaker speech "
    "standing studio style subject talk talker talking talks teacher tells that their them themselves then there "
    "they this two us very video view viewer voice was we wearing were while who whole woman words you young your "
)
COMMON_WORDS = (*_COMMON.split(), *";:!?'\"()")
"""Words and signs that direct nothing; training strews them into prompts, so that they are passed over."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "happy": (
        "amused", "cheerful", "cheery", "delighted", "delightful", "ecstatic", "elated", "euphoric", "glad", "happier",
        "jolly", "jovial", "joyful", "joyous", "merry", "overjoyed", "pleased", "radiant", "thrilled", "upbeat"
    ),
    "happily": ("cheerily", "delightedly", "gladly", "gleefully", "jovially", "joyfully", "merrily"),
    "smiling": ("beaming", "grin", "grinning", "grins", "laugh", "laughing", "laughs", "smiles"),
    "joy": ("cheer", "delight", "glee", "happiness"),
    "sad": (
        "cries", "crying", "dejected", "depressed", "disappointed", "downcast", "gloomy", "glum", "grieving",
        "heartbroken", "melancholy", "miserable", "mournful", "sorrowful", "tearful", "unhappy", "upset", "weeping"
    ),
    "sadly": ("gloomily", "miserably", "mournfully", "sorrowfully", "tearfully"),
    "sorrow": ("despair", "grief", "misery", "sadness"),
    "frowning": ("frown", "frowns"),
    "angry": (
        "aggressive", "annoyed", "enraged", "fuming", "furious", "grumpy", "hostile", "infuriated", "irate",
        "irritated", "livid", "mad", "outraged", "raging", "wrathful"
    ),
    "angrily": ("crossly", "irately", "madly"),
    "anger": ("fury", "rage", "wrath"),
    "surprised": ("aghast", "astounded", "baffled", "dumbfounded", "flabbergasted", "shocked", "startled", "stunned"),
    "surprise": ("amazement", "astonishment", "shock", "wonder"),
    "neutral": ("blank", "composed", "deadpan", "emotionless", "expressionless", "impassive", "relaxed", "serious"),
    "calmly": ("calm", "neutrally", "peacefully", "placidly", "quietly", "serenely"),
    "nodding": ("bob", "bobbing", "bobs", "nod", "nodded", "nods"),
    "tilting": (
        "cocking", "cocks", "inclines", "inclining", "lean", "leans", "sway", "swaying", "sways", "tilt", "tilted",
        "tilts"
    ),
    "turning": (
        "pivoting", "pivots", "rotates", "rotating", "swivelling", "swivels", "turn", "turned", "turns", "twisting",
        "twists"
    ),
    "shaking": ("shake", "shakes", "wagging", "wags"),
    "looking": ("glances", "glancing", "look", "looks"),
    "keeping": ("keep", "keeps"),
    "holding": ("hold", "holds"),
    "moving": ("move", "moves"),
    "still": ("frozen", "immobile", "motionless", "static", "stationary", "unmoving"),
    "slowly": ("leisurely", "slow"),
    "gently": ("gentle", "softly"),
    "quickly": ("quick", "rapid", "rapidly", "speedily", "swiftly"),
    "briskly": ("brisk",),
    "drifting": ("drift", "drifts"),
    "gliding": ("flowing", "flows", "glide", "glides", "scrolling", "scrolls", "slides", "sliding"),
    "passing": ("pass", "passes"),
    "falling": ("descending", "descends", "dropping", "drops", "fall", "falls"),
    "sinking": ("sink", "sinks"),
    "rising": ("ascending", "ascends", "climbing", "climbs", "rise", "rises"),
    "floating": ("float", "floats"),
    "left": ("leftward",),
    "right": ("rightward",),
    "down": ("downward", "downwards"),
    "up": ("upward", "upwards"),
    "background": ("backdrop", "scenery"),
    "sea": ("ocean",),
    "eyebrows": ("eyebrow",),
}  # fmt: skip
"""A word that directs puppets, and words to be read as it where the vocabulary lacks them."""


def puppet_vocabulary(prompts: Iterable[str]) -> dict[str, int]:
    """Ids of the special tokens, then of every word of the prompts, the template and `COMMON_WORDS` in sorted order."""
    words = set(TEMPLATE_WORDS) | set(COMMON_WORDS)
    for prompt in prompts:
        words.update(re.findall(r"\w+|[^\w\s]", prompt.lower().replace("-", " ")))
    return {word: i for i, word in enumerate((*PUPPET_TOKENS, *sorted(words)))}


def build_puppet_tokenizer(prompts: Iterable[str], *, closed: bool = False) -> Any:
    """A lower-casing word tokenizer whose vocabulary is that of `prompts`; hyphens part words, signs stand alone.

    Every sequence begins with [BOS]; `closed` adds [EOS], as CLIP's tokenizer does (Llama's does not: there the
    template closes the prompt). Both forms share one vocabulary.
    """
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = puppet_vocabulary(prompts)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    replacements = []
    for known, others in SYNONYMS.items():
        unknown = [word for word in others if word not in vocabulary]
        if known in vocabulary and unknown:
            replacements.append(normalizers.Replace(Regex(rf"\b(?:{'|'.join(unknown)})\b"), known))
    folded = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("-", " ")]
    tokenizer.normalizer = normalizers.Sequence([*folded, *replacements])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    ends = [(token, PUPPET_TOKENS.index(token)) for token in ("[BOS]", "[EOS]")]
    single = "[BOS] $A [EOS]" if closed else "[BOS] $A"
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="right",
    )
