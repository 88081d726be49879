"""What puppets say: small sentence grammars in many languages, made for the sound of them.

Training and test share neither languages (as espeak-ng voices) nor words: test English is a Scottish voice with a
vocabulary of its own. Now and then an invented word is put in, so that sounds also meet in orders no dictionary has.
For those who only listen (`mi_jax.puppets.phonemes`) there are 46 voices more, read from invented words alone.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """Sentences are: opener (sometimes), subject + verb + object (+ place). Without words, all are invented."""

    voices: tuple[str, ...]
    openers: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    invented: bool = True  # Latin letters: invented words can be read


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


TRAIN: dict[str, Grammar] = {
    "English": Grammar(
        voices=("en-us", "en", "en-gb-x-rp"),
        openers=_words(
            "hello there|good morning|well|you know|oh my|wait a moment|listen|I think so|maybe|by the way|"
            "of course|please"
        ),
        subjects=_words(
            "the old baker|my brother|a small brown bear|the young painter|our neighbour|the blue bird|everybody|"
            "a famous pilot|the teacher|my best friend|the mayor of the town|a happy farmer|the white horse|"
            "somebody|the moon|a boy named Peter"
        ),
        verbs=_words(
            "eats|sees|wants|carries|buys|makes|finds|paints|opens|remembers|brings|loves|moves|sells|hears|keeps"
        ),
        objects=_words(
            "a warm apple pie|five yellow balloons|the big wooden box|some fresh bread|a beautiful song|"
            "two bottles of milk|the heavy piano|purple flowers|a bowl of soup|my father's bicycle|the open window|"
            "a very long story|a map of the world|three brave knights|coffee and cake|many green leaves"
        ),
        places=_words(
            "in the garden|before breakfast|by the river|every morning|on top of the hill|near the harbour|at home|"
            "after the rain|under a bridge|in the middle of the room|on Monday|far away from here"
        ),
    ),
    "German": Grammar(
        voices=("de",),
        openers=_words("guten Tag|also gut|ach so|warte mal|weißt du|na ja|vielleicht|bitte"),
        subjects=_words(
            "der alte Bäcker|meine Mutter|ein kleiner Bär|die Lehrerin|unser Nachbar|das Mädchen|jemand|"
            "der Bürgermeister|die Königin|ein blauer Vogel"
        ),
        verbs=_words("sieht|kauft|bringt|findet|malt|öffnet|liebt|sucht|verkauft|hört"),
        objects=_words(
            "einen roten Apfel|das große Haus|fünf bunte Blumen|frisches Brot|ein schönes Lied|den schweren Koffer|"
            "eine Tasse Kaffee|die alte Uhr|viele Bücher|einen warmen Pullover"
        ),
        places=_words(
            "im Garten|am Fluss|jeden Morgen|auf dem Berg|vor dem Frühstück|in der Stadt|nach dem Regen|zu Hause|"
            "unter der Brücke"
        ),
    ),
    "French": Grammar(
        voices=("fr", "fr-be"),
        openers=_words("bonjour|alors|voilà|écoute|bien sûr|peut-être|mon ami|attends"),
        subjects=_words(
            "le vieux boulanger|ma sœur|un petit ours brun|la voisine|notre professeur|l'oiseau bleu|quelqu'un|"
            "la reine|le garçon|un peintre"
        ),
        verbs=_words("mange|voit|achète|porte|trouve|ouvre|aime|cherche|chante|apporte"),
        objects=_words(
            "une pomme rouge|la grande maison|cinq ballons jaunes|du pain frais|une belle chanson|la boîte en bois|"
            "un bouquet de fleurs|le vieux piano|beaucoup de livres|une soupe chaude"
        ),
        places=_words(
            "dans le jardin|au bord du fleuve|chaque matin|sur la colline|avant midi|à la maison|après la pluie|"
            "sous le pont"
        ),
    ),
    "Spanish": Grammar(
        voices=("es", "es-419"),
        openers=_words("buenos días|bueno|mira|oye|por favor|claro que sí|tal vez|hola amigo"),
        subjects=_words(
            "el viejo panadero|mi hermana|un oso pequeño|la maestra|nuestro vecino|el pájaro azul|alguien|la reina|"
            "el muchacho|un famoso pintor"
        ),
        verbs=_words("come|mira|compra|lleva|encuentra|pinta|abre|busca|vende|escucha"),
        objects=_words(
            "una manzana roja|la casa grande|cinco globos amarillos|pan fresco|una canción bonita|"
            "la caja de madera|muchas flores|el piano pesado|un libro viejo|una sopa caliente"
        ),
        places=_words(
            "en el jardín|junto al río|cada mañana|sobre la montaña|antes del desayuno|en casa|"
            "después de la lluvia|debajo del puente"
        ),
    ),
    "Italian": Grammar(
        voices=("it",),
        openers=_words("buongiorno|allora|senti|va bene|forse|amico mio|aspetta|ecco"),
        subjects=_words(
            "il vecchio fornaio|mia sorella|un piccolo orso|la maestra|il nostro vicino|l'uccello blu|qualcuno|"
            "la regina|il ragazzo|un pittore famoso"
        ),
        verbs=_words("mangia|vede|compra|porta|trova|dipinge|apre|cerca|vende|ascolta"),
        objects=_words(
            "una mela rossa|la casa grande|cinque palloni gialli|il pane fresco|una bella canzone|"
            "la scatola di legno|molti fiori|il pianoforte|un libro antico|una zuppa calda"
        ),
        places=_words(
            "nel giardino|vicino al fiume|ogni mattina|sulla collina|prima di pranzo|a casa|dopo la pioggia|"
            "sotto il ponte"
        ),
    ),
    "Brazilian Portuguese": Grammar(
        voices=("pt-br",),
        openers=_words("bom dia|então|olha|por favor|talvez|meu amigo|espera|claro"),
        subjects=_words(
            "o velho padeiro|minha irmã|um pequeno urso|a professora|nosso vizinho|o pássaro azul|alguém|a rainha|"
            "o menino|um pintor famoso"
        ),
        verbs=_words("come|vê|compra|leva|encontra|pinta|abre|procura|vende|escuta"),
        objects=_words(
            "uma maçã vermelha|a casa grande|cinco balões amarelos|pão fresco|uma canção bonita|a caixa de madeira|"
            "muitas flores|o piano pesado|um livro antigo|uma sopa quente"
        ),
        places=_words(
            "no jardim|perto do rio|toda manhã|sobre a montanha|antes do almoço|em casa|depois da chuva|"
            "debaixo da ponte"
        ),
    ),
    "Dutch": Grammar(
        voices=("nl",),
        openers=_words("goedemorgen|nou ja|luister eens|misschien|wacht even|mijn vriend|alstublieft|natuurlijk"),
        subjects=_words(
            "de oude bakker|mijn zus|een kleine beer|de lerares|onze buurman|de blauwe vogel|iemand|de koningin|"
            "de jongen|een beroemde schilder"
        ),
        verbs=_words("eet|ziet|koopt|draagt|vindt|schildert|opent|zoekt|verkoopt|hoort"),
        objects=_words(
            "een rode appel|het grote huis|vijf gele ballonnen|vers brood|een mooi lied|de houten doos|"
            "veel bloemen|de zware piano|een oud boek|een warme soep"
        ),
        places=_words(
            "in de tuin|bij de rivier|elke ochtend|op de heuvel|voor het ontbijt|thuis|na de regen|onder de brug"
        ),
    ),
    "Polish": Grammar(
        voices=("pl",),
        openers=_words("dzień dobry|no dobrze|posłuchaj|może|poczekaj|mój przyjacielu|proszę|oczywiście"),
        subjects=_words(
            "stary piekarz|moja siostra|mały niedźwiedź|nauczycielka|nasz sąsiad|niebieski ptak|ktoś|królowa|"
            "chłopiec|sławny malarz"
        ),
        verbs=_words("widzi|kupuje|niesie|znajduje|maluje|otwiera|lubi|sprzedaje|bierze|pamięta"),
        objects=_words(
            "czerwone jabłko|duży dom|pięć balonów|świeży chleb|piękne obrazy|drewniane pudełko|dużo kwiatów|"
            "ciężki fortepian|stare książki|gorące mleko"
        ),
        places=_words("w ogrodzie|nad rzeką|każdego ranka|na wzgórzu|przed śniadaniem|w domu|po deszczu|pod mostem"),
    ),
    "Russian": Grammar(
        voices=("ru",),
        openers=_words("добрый день|ну хорошо|послушай|может быть|подожди|мой друг|пожалуйста|конечно"),
        subjects=_words(
            "старый пекарь|моя сестра|маленький медведь|учительница|наш сосед|синяя птица|кто-то|королева|мальчик|"
            "знаменитый художник"
        ),
        verbs=_words("видит|покупает|несёт|находит|рисует|открывает|любит|ищет|продаёт|помнит"),
        objects=_words(
            "красное яблоко|большой дом|пять шаров|свежий хлеб|красивые картины|деревянный ящик|много цветов|"
            "тяжёлый рояль|старые книги|горячее молоко"
        ),
        places=_words("в саду|у реки|каждое утро|на холме|перед завтраком|дома|после дождя|под мостом"),
        invented=False,
    ),
    "Turkish": Grammar(
        voices=("tr",),
        openers=_words("günaydın|peki|bak|belki|bekle biraz|dostum|lütfen|elbette"),
        subjects=_words(
            "yaşlı fırıncı|benim kardeşim|küçük bir ayı|öğretmen|komşumuz|mavi kuş|birisi|kraliçe|çocuk|ünlü ressam"
        ),
        objects=_words(
            "kırmızı elmayı|büyük evi|beş balonu|taze ekmeği|güzel şarkıyı|tahta kutuyu|çiçekleri|ağır piyanoyu|"
            "eski kitabı|sıcak çorbayı"
        ),
        verbs=_words("görüyor|alıyor|taşıyor|buluyor|açıyor|seviyor|arıyor|satıyor|bekliyor|unutuyor"),
        places=_words(
            "bahçede|nehrin yanında|her sabah|tepenin üstünde|kahvaltıdan önce|evde|yağmurdan sonra|"
            "köprünün altında"
        ),
    ),
    "Hindi": Grammar(
        voices=("hi",),
        openers=_words("नमस्ते|अच्छा|सुनो|शायद|रुको ज़रा|मेरे दोस्त|कृपया|बिल्कुल"),
        subjects=_words("बूढ़ा आदमी|मेरा भाई|छोटा भालू|लड़का|हमारा पड़ोसी|राजा|कोई|माली"),
        objects=_words("लाल सेब|बड़ा घर|पाँच फूल|ताज़ी रोटी|सुंदर गाना|लकड़ी का डिब्बा|पुरानी किताब|गरम चाय"),
        verbs=_words("देखता है|लाता है|चाहता है|ढूँढता है|खोलता है|बेचता है|रखता है|भूलता है"),
        places=_words("बगीचे में|नदी के पास|हर सुबह|पहाड़ पर|घर में|बारिश के बाद|पुल के नीचे|बाज़ार में"),
        invented=False,
    ),
    "Indonesian": Grammar(
        voices=("id",),
        openers=_words("selamat pagi|baiklah|dengar|mungkin|tunggu sebentar|temanku|silakan|tentu saja"),
        subjects=_words(
            "tukang roti|adik saya|beruang kecil|ibu guru|tetangga kami|burung biru|seseorang|sang ratu|anak itu|"
            "pelukis muda"
        ),
        verbs=_words("makan|melihat|membeli|membawa|menemukan|melukis|membuka|mencari|menjual|mendengar"),
        objects=_words(
            "apel merah|rumah besar|lima balon kuning|roti segar|lagu indah|kotak kayu|banyak bunga|piano tua|"
            "buku lama|sup panas"
        ),
        places=_words(
            "di kebun|di tepi sungai|setiap pagi|di atas bukit|sebelum sarapan|di rumah|setelah hujan|"
            "di bawah jembatan"
        ),
    ),
}  # fmt: skip

TEST: dict[str, Grammar] = {
    "Scottish English": Grammar(
        voices=("en-gb-scotland",),
        openers=_words("good evening|now then|look here|I suppose|guess what|to be honest|never mind|thank you"),
        subjects=_words(
            "the clever fox|her uncle|a tired sailor|the night watchman|their grandmother|the grey elephant|nobody|"
            "a lonely shepherd|the doctor|Barbara"
        ),
        verbs=_words("mends|follows|borrows|throws|washes|describes|watches|steals|builds|hides"),
        objects=_words(
            "a broken umbrella|seven silver spoons|the tallest tower|pepper and salt|a pair of boots|"
            "the missing button|an empty basket|the evening paper|a wooden puppet|blueberry jam"
        ),
        places=_words(
            "behind the barn|at midnight|across the valley|in the kitchen|on the old ship|during winter|"
            "beside the fire|along the beach"
        ),
    ),
    "Swedish": Grammar(
        voices=("sv",),
        openers=_words("god kväll|nåväl|hör på|kanske|vänta lite|min vän|tack så mycket|självklart"),
        subjects=_words(
            "den gamle fiskaren|min moster|en liten räv|sjuksköterskan|vår granne|den grå katten|ingen|prinsen|"
            "flickan|en trött sjöman"
        ),
        verbs=_words("ser|köper|bär|hittar|målar|öppnar|gömmer|söker|bygger|hör"),
        objects=_words(
            "en trasig paraply|det höga tornet|sju silverskedar|varm choklad|en lustig saga|den tomma korgen|"
            "många stenar|ett par stövlar|tidningen|blåbärssylt"
        ),
        places=_words(
            "bakom ladan|vid midnatt|i köket|på stranden|under vintern|bredvid elden|genom skogen|på båten"
        ),
    ),
    "Czech": Grammar(
        voices=("cs",),
        openers=_words("dobrý večer|tak dobře|poslyš|možná|počkej chvíli|příteli|děkuji|samozřejmě"),
        subjects=_words(
            "starý rybář|moje teta|malá liška|lékařka|náš soused|šedý slon|nikdo|princ|holka|unavený námořník"
        ),
        verbs=_words("vidí|kupuje|nosí|hledá|maluje|otevírá|schovává|staví|ztrácí|myje"),
        objects=_words(
            "rozbitý deštník|vysokou věž|sedm lžic|horkou čokoládu|veselou pohádku|prázdný košík|mnoho kamenů|"
            "nové boty|večerní noviny|sladké maliny"
        ),
        places=_words("za stodolou|o půlnoci|v kuchyni|na pláži|v zimě|vedle ohně|v lese|na lodi"),
    ),
    "Romanian": Grammar(
        voices=("ro",),
        openers=_words("bună seara|ei bine|ascultă|poate|așteaptă puțin|prietene|mulțumesc|desigur"),
        subjects=_words(
            "bătrânul pescar|mătușa mea|o vulpe mică|doctorița|vecinul nostru|elefantul gri|nimeni|prințul|fata|"
            "un marinar obosit"
        ),
        verbs=_words("vede|cumpără|poartă|caută|pictează|deschide|ascunde|clădește|pierde|spală"),
        objects=_words(
            "o umbrelă ruptă|turnul înalt|șapte linguri|ciocolată caldă|o poveste veselă|coșul gol|multe pietre|"
            "o pereche de cizme|ziarul de seară|dulceață de mure"
        ),
        places=_words(
            "în spatele casei|la miezul nopții|în bucătărie|pe plajă|iarna|lângă foc|prin pădure|pe corabie"
        ),
    ),
    "Finnish": Grammar(
        voices=("fi",),
        openers=_words("hyvää iltaa|no niin|kuuntele|ehkä|odota hetki|ystäväni|kiitos paljon|tietysti"),
        subjects=_words(
            "vanha kalastaja|minun tätini|pieni kettu|lääkäri|naapurimme|harmaa norsu|kukaan|prinssi|tyttö|"
            "väsynyt merimies"
        ),
        verbs=_words("näkee|ostaa|kantaa|etsii|maalaa|avaa|piilottaa|rakentaa|kadottaa|pesee"),
        objects=_words(
            "rikkinäisen sateenvarjon|korkean tornin|seitsemän lusikkaa|kuumaa suklaata|hauskan tarinan|"
            "tyhjän korin|monta kiveä|uudet saappaat|iltalehden|mustikkahilloa"
        ),
        places=_words("ladon takana|keskiyöllä|keittiössä|rannalla|talvella|tulen vieressä|metsässä|laivalla"),
    ),
}  # fmt: skip

# The training languages and, by their rules of reading alone, others that espeak-ng reads from Latin letters and writes
# in IPA; none of the test languages.
WIDE: dict[str, Grammar] = TRAIN | {
    voice: Grammar(voices=(voice,))
    for voice in (
        "af", "an", "az", "bs", "ca", "ca-ba", "ca-nw", "ca-va", "cy", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd",
        "en-us-nyc", "eo", "et", "eu", "fr-ch", "gd", "gn", "haw", "hr", "ht", "hu", "ia", "io", "is", "ku", "lfn",
        "lt", "ltg", "lv", "ms", "mt", "nb", "nci", "pap", "pt", "qu", "sk", "sl", "smj", "sq", "sw", "tk", "tn", "uz",
    )
}  # fmt: skip

_ONSETS = ("b", "p", "m", "f", "v", "t", "d", "n", "s", "l", "r", "k", "g", "w", "sh", "")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_CODAS = ("", "", "", "m", "n", "p", "l", "s")


def invent_word(rng: np.random.Generator) -> str:
    """Two or three syllables that mean nothing."""
    pick = lambda parts: parts[int(rng.integers(len(parts)))]  # noqa: E731
    return "".join(pick(_ONSETS) + pick(_VOWELS) + pick(_CODAS) for _ in range(int(rng.integers(2, 4))))


_WIDE_ONSETS = (
    *_ONSETS, "b", "p", "m", "br", "pl", "tr", "dr", "st", "sk", "fl", "kr", "gl", "y", "h", "j", "z", "ch", "th"
)  # fmt: skip
_WIDE_VOWELS = (
    "a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "y", "aa", "ee", "ii", "oo", "uu", "ai", "au", "ei", "ia", "oi",
    "ue", "ä", "ö", "ü", "é", "å", "ø"
)  # fmt: skip
_WIDE_CODAS = (*_CODAS, "", "", "t", "r", "k", "b", "nd", "rt", "st", "mp", "ng", "tt", "ll", "f", "sh", "g", "d")


def _babble(rng: np.random.Generator) -> str:
    """A word of one to four syllables from more letters than `invent_word` has."""
    pick = lambda parts: parts[int(rng.integers(len(parts)))]  # noqa: E731
    return "".join(pick(_WIDE_ONSETS) + pick(_WIDE_VOWELS) + pick(_WIDE_CODAS) for _ in range(int(rng.integers(1, 5))))


def sentence(rng: np.random.Generator, grammar: Grammar) -> list[str]:
    """One sentence as the phrases between its pauses."""
    if not grammar.subjects:
        phrase = " ".join(_babble(rng) for _ in range(int(rng.integers(2, 7))))
        return [phrase + ("?" if rng.random() < 0.12 else ".")]
    pick = lambda parts: parts[int(rng.integers(len(parts)))]  # noqa: E731
    core = [pick(grammar.subjects), pick(grammar.verbs), pick(grammar.objects)]
    if grammar.voices[0] in ("tr", "hi"):  # verb last
        core = [core[0], core[2], core[1]]
    if grammar.invented and rng.random() < 0.12:
        core[int(rng.integers(3))] = invent_word(rng)
    phrases = [" ".join(core)]
    if rng.random() < 0.55:
        if rng.random() < 0.6:
            phrases = [phrases[0] + " " + pick(grammar.places)]
        else:
            phrases = [pick(grammar.places), phrases[0]]
    if rng.random() < 0.35:
        phrases = [pick(grammar.openers), *phrases]
    phrases[-1] += "?" if rng.random() < 0.12 else "."
    return phrases
