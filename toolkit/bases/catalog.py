"""The bases that Maltu knows by a short name, with the address of every figure and the day it was read.

`python -m toolkit.bases.catalog > docs/bases.md` writes the page. Imports no torch: a recipe is checked against this
before anything heavy loads.
"""

import difflib
import sys

from toolkit.bases.known import FIGURES, KnownBase, Shape, Source, differences, gaps

__all__ = ["BASES", "KnownBase", "Shape", "Source", "differences", "find", "gaps", "main", "nearest", "page"]

K = 1024  # a source that says 32K means 32,768 tokens


def _read(url: str, *figures: str) -> dict[str, Source]:
    return {figure: Source(url) for figure in figures}


_HUB, _GITHUB = "https://huggingface.co/", "https://github.com/"
_SPOKEN_MINI = "data/base/spoken-mini/README.md"
_QWEN25 = _GITHUB + "QwenLM/qwenlm.github.io/blob/0069c1fccd35f7eaf554331ae6b9ee4de02140cf/blog/qwen2.5-llm/index.html"
_QWEN3 = _GITHUB + "QwenLM/qwenlm.github.io/blob/0069c1fccd35f7eaf554331ae6b9ee4de02140cf/blog/qwen3/index.html"
_QWEN3_README = _GITHUB + "QwenLM/Qwen3/blob/4d9f43e9ffc587202fb2225ca9e250761a2a28e3/README.md"
_KERAS = _GITHUB + "keras-team/keras-hub/"
_QWEN3_SIZES = _KERAS + "blob/1df65dab96fb417c6df011c25802017109e96c66/keras_hub/src/models/qwen3/qwen3_presets.py"
_GEMMA3_SIZES = _KERAS + "blob/00d9f10a8e74d4f552ed50170b7dcadb65d3bd52/keras_hub/src/models/gemma3/gemma3_presets.py"
_GEMMA2 = _GITHUB + "huggingface/blog/blob/0b451686310c191a4361684ec24e399a160efb6d/gemma2.md"
_GEMMA3 = _GITHUB + "huggingface/blog/blob/0130f12a178fbd32bfc977c1f2dba347d6e458e9/gemma3.md"
_GEMMA3_CARD = _HUB + "ggml-org/gemma-3-27b-it-GGUF/blob/main/README.md?code=true"
_GEMMA_TERMS = "https://ai.google.dev/gemma/docs/embeddinggemma?authuser=3&hl=es"
_META = _GITHUB + "meta-llama/llama-models/blob/"
_LLAMA = _META + "1156e8676f57de65e085abde5b5e6bf79857ae6f/models/llama3_2/MODEL_CARD.md"
_LLAMA_LICENCE = _META + "fc5d5442c4b4d7cb33b0e925a30acfb479b34d2a/models/llama3_2/LICENSE"
_EXAONE35 = _GITHUB + "LG-AI-EXAONE/EXAONE-3.5/blob/e225c33bdee76c283da460530e928945217ddadf/README.md"
_EXAONE35_CARD = _HUB + "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct"
_EXAONE4 = _GITHUB + "LG-AI-EXAONE/EXAONE-4.0/blob/09300b1de15c9c4bf94e06e6878bf517562f7ffe/README.md"
_EXAONE4_DOC = _GITHUB + (
    "huggingface/transformers/blob/16ea78cab253a897b469cd3fdadb28fd40278b68/docs/source/en/model_doc/exaone4.md"
)
_KANANA = _GITHUB + "kakao/kanana/blob/186d0d490597cbe0063d80c6dacecdcf9bc18de3/README.md"
_KANANA_8B = _HUB + "kakaocorp/kanana-1.5-8b-instruct-2505/blob/main/LICENSE"
_KANANA_NANO = _HUB + "kakaocorp/kanana-nano-2.1b-instruct/tree/main/assets"
_MIDM = _GITHUB + "K-intelligence-Midm/Midm-2.0/blob/809fcbcf487d68e0f1f9058e702859a185cdd3bc/README.md"
_CLOVA_05 = _HUB + "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-0.5B"
_CLOVA_05_COPY = _HUB + "OpenLLM-Korea/HyperCLOVAX-SEED-Text-Instruct-0.5B/blob/main/tokenizer.json"
_CLOVA_15 = _HUB + "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B"
_AX = _GITHUB + "SKT-AI/A.X-4.0/blob/08d81d6cceaa5427624edadba6316f758d780b99/README.md"
_SMOLLM = _GITHUB + "huggingface/smollm/blob/520bf251856580cd16ef71cad65e41dfcc222634/README.md"
_SMOLLM2_360M = _HUB + "HuggingFaceTB/SmolLM2-360M-Instruct/blob/c15f933c73438218a2bc078446c513173cc4f06a/vocab.json"
_SMOLLM2_TEMPLATES = {
    "135M": "https://onnx.bimant.com/models/HuggingFaceTB/SmolLM2-135M-Instruct",
    "360M": _HUB + "huggingfacetb/SmolLM2-360M-Instruct",
    "1.7B": _SMOLLM,
}
_SMOLLM3_SHAPE = "https://pypi.org/project/transformers/5.23.0/#models/smollm3/configuration_smollm3.py"
_SMOLLM3 = _GITHUB + "huggingface/blog/blob/124475da2301eabe0a8e7da6bcf72159abe974bc/smollm3.md"
_COOKBOOK = _GITHUB + "microsoft/PhiCookBook/blob/3ec6531165b2936b5f154e8709ab285b02cdcd2e/"
_PHI = _COOKBOOK + "md/01.Introduction/01/01.PhiFamily.md"
_PHI35 = _HUB + "microsoft/Phi-3.5-mini-instruct/discussions/14"
_PHI35_CARD = _HUB + "LoneStriker/Phi-3.5-mini-instruct-GGUF"
_PHI4 = _HUB + "pytorch/Phi-4-mini-instruct-FP8/blob/8b3ab586ddf58c9c84921b3b09bb1d01c8300e83/merges.txt"
_PHI4_CARD = _HUB + "aifeifei798/Phi-4-mini-instruct-bnb-4bit"
_LFM2 = _HUB + "LiquidAI/LFM2-1.2B/blob/26bb21ffbfe2d9527e007758ddddb3700955d2af/README.md"
_LFM2_SIZES = _HUB + "LiquidAI/LFM2-700M/commit/d300d6a4eeb64f65a4b5433227a008e918f71688"
# The shapes below were read in one table of configs, the templates in the files that trl 1.16.0 ships, and what the
# Apache licence permits in a copy of its text.
_SHAPES = _GITHUB + "Lightning-AI/litgpt/blob/0006c973aa7d6ace293e2a5fedaf1f8f804f960c/litgpt/config.py"
_TEMPLATES = "https://pypi.org/project/trl/1.16.0/#trl/chat_templates/README.md"
_APACHE = _GITHUB + "Lightning-AI/litgpt/blob/d055a430ab42491705f3bbff7b0e1bcf47dd7556/LICENSE"


# fmt: off
def _qwen25(size: str, parameters: int, context: int, shape: Shape) -> KnownBase:
    research = size == "3B"  # the one size under the research licence
    terms = _HUB + "MadeAgents/Hammer2.0-3b/discussions/1" if research else _APACHE
    sources = {
        **_read(_QWEN25, "parameters", "licence", "context"),
        **_read(_HUB + "Qwen/Qwen2.5-0.5B-Instruct", "languages"),
        **_read(terms, "commercial"),
        **_read(_TEMPLATES, "template"),
        **_read(_SHAPES, "shape"),
    }
    return KnownBase(
        f"qwen2.5-{size.lower()}", f"Qwen/Qwen2.5-{size}-Instruct", languages=("en", "ko"), more_languages=27,
        parameters=parameters, licence="Qwen Research" if research else "Apache-2.0", commercial=not research,
        context=context, template="unmarked", shape=shape, sources=sources,
    )


def _qwen3(size: str, parameters: int, context: int, shape: Shape) -> KnownBase:
    sources = {
        **_read(_QWEN3, "languages", "licence", "context"),
        **_read(_QWEN3_SIZES, "parameters"),
        **_read(_APACHE, "commercial"),
        **_read(_TEMPLATES, "template"),
        **_read(_SHAPES, "shape"),
    }
    return KnownBase(
        f"qwen3-{size.lower()}", f"Qwen/Qwen3-{size}", languages=("en", "ko"), more_languages=117,
        parameters=parameters, licence="Apache-2.0", commercial=True, context=context, template="unmarked", shape=shape,
        note="Thinks before it answers unless told not to.", sources=sources,
    )

def _smollm2(size: str, parameters: int, shape: Shape) -> KnownBase:
    whole = size == "360M"  # the one size whose page was read
    sources = {
        **_read(_SMOLLM, "parameters"),
        **_read(_SMOLLM2_TEMPLATES[size], "template"),
        **_read(_SHAPES, "context", "shape"),
        **(_read(_SMOLLM2_360M, "languages", "licence") | _read(_APACHE, "commercial") if whole else {}),
    }
    return KnownBase(
        f"smollm2-{size.lower()}", f"HuggingFaceTB/SmolLM2-{size}-Instruct", languages=("en",) if whole else None,
        parameters=parameters, licence="Apache-2.0" if whole else None, commercial=True if whole else None,
        context=8192, template="present", shape=shape, sources=sources,
    )


def _llama32(size: str, parameters: int, shape: Shape) -> KnownBase:
    return KnownBase(
        f"llama-3.2-{size.lower()}", f"meta-llama/Llama-3.2-{size}-Instruct",
        languages=("en", "de", "fr", "it", "pt", "hi", "es", "th"), parameters=parameters, commercial=True,
        licence="Llama 3.2 Community License", context=128 * K, template="unmarked", shape=shape,
        note="Korean is not among the supported languages. Gated on the hub. The name of a model made from it must "
        "begin with Llama; above 700 million monthly users Meta has to be asked.",
        sources={**_read(_LLAMA, "languages", "parameters", "licence", "context"),
                 **_read(_LLAMA_LICENCE, "commercial"), **_read(_TEMPLATES, "template"), **_read(_SHAPES, "shape")},
    )


def _gemma3(size: str, parameters: int, shape: Shape | None, note: str = "") -> KnownBase:
    known = {"1b": (("en",), 32 * K), "4b": (("en",), 128 * K)}.get(size, (None, None))
    sources = {
        **_read(_GEMMA3_SIZES, "parameters"), **_read(_GEMMA3_CARD, "licence"), **_read(_GEMMA_TERMS, "commercial"),
        **_read(_TEMPLATES, "template"), **(_read(_GEMMA3, "languages", "context") if known[0] else {}),
        **(_read(_SHAPES, "shape") if shape else {}),
    }
    return KnownBase(
        f"gemma-3-{size}", f"google/gemma-3-{size}-it", languages=known[0], more_languages=139 if size == "4b" else 0,
        parameters=parameters, licence="Gemma Terms of Use", commercial=True, context=known[1], template="unmarked",
        shape=shape, note=note, sources=sources,
    )


def _lfm2(size: str, parameters: int) -> KnownBase:
    whole = size == "1.2B"
    sources = {**_read(_LFM2_SIZES, "parameters"), **_read(_TEMPLATES, "template"),
               **(_read(_LFM2, "languages", "licence") if whole else {}),
               **(_read("https://featherless.ai/models/LiquidAI/LFM2-1.2B", "context") if whole else {})}
    return KnownBase(
        f"lfm2-{size.lower()}", f"LiquidAI/LFM2-{size}",
        languages=("en", "ar", "zh", "fr", "de", "ja", "ko", "es") if whole else None, parameters=parameters,
        licence="LFM Open License v1.0" if whole else None, context=32 * K if whole else None, template="unmarked",
        note="Ten of its sixteen layers are convolutions. Its licence limits commercial use: read it.", sources=sources,
    )


_MINI = KnownBase(
    "spoken-mini", None, shipped=True, languages=("ko", "en"), parameters=5_310_720, context=512, template="marked",
    licence="CC BY 4.0", commercial=True, spoken=True, shape=Shape(4, 256, 704, 4, 4, 64, 8192),
    note="Comes with Maltu; needs no network.",
    sources=_read(
        _SPOKEN_MINI, "languages", "parameters", "licence", "commercial", "context", "template", "spoken", "shape"
    ),
)
_KOREAN = (
    KnownBase(
        "exaone-4.0-1.2b", "LGAI-EXAONE/EXAONE-4.0-1.2B", languages=("ko", "en", "es"), parameters=1_200_000_000,
        licence="EXAONE AI Model License 1.2 - NC", commercial=False, context=64 * K, template="present",
        shape=Shape(30, 2048, 4096, 32, 8, 64, 102_400), note="Answers without thinking unless asked to.",
        sources={**_read(_EXAONE4, "languages", "parameters", "licence", "commercial", "template"),
                 **_read(_EXAONE4_DOC, "context", "shape")},
    ),
    KnownBase(
        "exaone-3.5-2.4b", "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct", languages=("ko", "en"), parameters=2_400_000_000,
        licence="EXAONE AI Model License 1.1 - NC", commercial=False, context=32 * K, template="present",
        shape=Shape(30, 2560, 7168, 32, 8, 80, 102_400), remote_code=True,
        note="Its own code has to be trusted; it was written for transformers 4.43 and was not tried here.",
        sources={**_read(_EXAONE35_CARD, "languages", "parameters", "context"), **_read(_EXAONE35, "licence"),
                 **_read(_EXAONE35, "commercial", "template"),
                 **_read(_HUB + "mlx-community/EXAONE-3.5-2.4B-Instruct-4bit/raw/main/config.json", "shape")},
    ),
    KnownBase(
        "exaone-3.5-7.8b", "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct", languages=("ko", "en"), parameters=7_800_000_000,
        licence="EXAONE AI Model License 1.1 - NC", commercial=False, context=32 * K, template="present",
        remote_code=True, note="As exaone-3.5-2.4b.",
        sources=_read(_EXAONE35, "languages", "parameters", "licence", "commercial", "context", "template"),
    ),
    KnownBase(
        "kanana-1.5-8b", "kakaocorp/kanana-1.5-8b-instruct-2505", languages=("ko", "en"), parameters=8_000_000_000,
        licence="Apache-2.0", commercial=True, context=32 * K, template="present",
        sources={**_read(_KANANA, "parameters", "licence", "context"), **_read(_APACHE, "commercial"),
                 **_read(_KANANA_8B, "languages", "template")},
    ),
    KnownBase(
        "kanana-1.5-2.1b", "kakaocorp/kanana-1.5-2.1b-instruct-2505", parameters=2_100_000_000, licence="Apache-2.0",
        commercial=True, context=32 * K,
        note="Likely not to load: transformers 5.23 refuses a hidden size of 1,792 with 24 heads, which a fine-tune of "
        "a Kanana of this size declares.",
        sources={**_read(_KANANA, "parameters", "licence", "context"), **_read(_APACHE, "commercial"),
                 **_read(_HUB + "binwon/kanana-cot/blob/main/config.json", "note")},
    ),
    KnownBase(
        "kanana-nano-2.1b", "kakaocorp/kanana-nano-2.1b-instruct", languages=("ko", "en"), parameters=2_100_000_000,
        licence="CC-BY-NC-4.0", commercial=False, note="As kanana-1.5-2.1b.",
        sources={**_read(_KANANA_NANO, "languages", "licence", "commercial"), **_read(_KANANA, "parameters")},
    ),
    KnownBase(
        "midm-2.0-mini", "K-intelligence/Midm-2.0-Mini-Instruct", languages=("ko", "en"), parameters=2_300_000_000,
        licence="MIT", commercial=True, template="present",
        sources={**_read(_MIDM, "languages", "parameters", "licence", "template"),
                 **_read("https://arxiv.org/html/2601.09066v1", "commercial")},
    ),
    KnownBase(
        "hyperclovax-seed-0.5b", "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-0.5B", languages=("ko",),
        parameters=570_000_000, licence="HyperCLOVA X SEED", context=4 * K, template="present",
        note="Its licence has conditions on commercial use that were not read whole.",
        sources={**_read(_CLOVA_05, "languages", "parameters", "context"), **_read(_CLOVA_05_COPY, "licence"),
                 **_read("https://model.aibase.com/en/models/details/1924737626137694208", "template")},
    ),
    KnownBase(
        "hyperclovax-seed-1.5b", "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B", parameters=1_500_000_000,
        template="present", note="As hyperclovax-seed-0.5b.", sources=_read(_CLOVA_15, "parameters", "template"),
    ),
    KnownBase(
        "ax-4.0-light", "skt/A.X-4.0-Light", languages=("ko", "en"), parameters=7_000_000_000, context=16 * K,
        note="Qwen2.5 trained on with Korean.",
        sources={**_read(_AX, "languages", "parameters"),
                 **_read("https://model.aibase.com/en/models/details/1942037920533975040", "context")},
    ),
)
_OTHERS = (
    KnownBase(
        "qwen3-4b-2507", "Qwen/Qwen3-4B-Instruct-2507", languages=("en", "ko"), more_languages=117,
        parameters=4_000_000_000, licence="Apache-2.0", commercial=True, context=256 * K, template="unmarked",
        shape=Shape(36, 2560, 9728, 32, 8, 128, 151_936), note="Never thinks.",
        sources={**_read(_QWEN3_README, "parameters", "licence", "context"), **_read(_QWEN3, "languages"),
                 **_read(_APACHE, "commercial"), **_read(_TEMPLATES, "template"), **_read(_SHAPES, "shape")},
    ),
    KnownBase(
        "gemma-2-2b", "google/gemma-2-2b-it", languages=("en",), parameters=2_614_341_888,
        licence="Gemma Terms of Use", commercial=True, context=8 * K, template="unmarked",
        shape=Shape(26, 2304, 9216, 8, 4, 256, 256_000), note="Takes no system turn.",
        sources={**_read(_GEMMA2, "languages", "licence", "commercial", "context"), **_read(_TEMPLATES, "template"),
                 **_read(_KERAS + "pull/1721.diff", "parameters"), **_read(_SHAPES, "shape")},
    ),
    _gemma3("270m", 268_098_176, None),
    _gemma3("1b", 999_885_952, Shape(26, 1152, 6912, 4, 1, 256, 262_144)),
    _gemma3("4b", 3_880_099_328, Shape(34, 2560, 10_240, 8, 4, 256, 262_144), "Figures without its image encoder."),
    _llama32("1B", 1_230_000_000, Shape(16, 2048, 8192, 32, 8, 64, 128_256)),
    _llama32("3B", 3_210_000_000, Shape(28, 3072, 8192, 24, 8, 128, 128_256)),
    _smollm2("135M", 135_000_000, Shape(30, 576, 1536, 9, 3, 64, 49_152)),
    _smollm2("360M", 360_000_000, Shape(32, 960, 2560, 15, 5, 64, 49_152)),
    _smollm2("1.7B", 1_700_000_000, Shape(24, 2048, 8192, 32, 32, 64, 49_152)),
    KnownBase(
        "smollm3-3b", "HuggingFaceTB/SmolLM3-3B", languages=("en", "fr", "es", "de", "it", "pt"),
        parameters=3_000_000_000, context=64 * K, template="present",
        shape=Shape(36, 2048, 11_008, 16, 4, 128, 128_256),
        note="Thinks before it answers unless told not to.",
        sources={**_read(_SMOLLM3, "languages", "parameters", "context", "template"),
                 **_read(_SMOLLM3_SHAPE, "shape")},
    ),
    KnownBase(
        "phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct", parameters=3_800_000_000, licence="MIT", commercial=True,
        context=128 * K, template="unmarked", shape=Shape(32, 3072, 8192, 32, 32, 96, 32_064),
        sources={**_read(_PHI, "parameters"), **_read(_PHI35, "licence"),
                 **_read(_PHI35_CARD, "commercial", "context"), **_read(_TEMPLATES, "template"),
                 **_read(_SHAPES, "shape")},
    ),
    KnownBase(
        "phi-4-mini", "microsoft/Phi-4-mini-instruct", parameters=3_800_000_000, licence="MIT", commercial=True,
        context=128 * K, shape=Shape(32, 3072, 8192, 24, 8, 128, 200_064),
        sources={**_read(_PHI, "parameters"), **_read(_PHI4_CARD, "commercial", "context"), **_read(_SHAPES, "shape"),
                 **_read(_PHI4, "licence")},
    ),
    _lfm2("350M", 354_483_968),
    _lfm2("1.2B", 1_170_340_608),
)

BASES: tuple[KnownBase, ...] = (
    _MINI,
    *_KOREAN,
    _qwen25("0.5B", 490_000_000, 32 * K, Shape(24, 896, 4864, 14, 2, 64, 151_936)),
    _qwen25("1.5B", 1_540_000_000, 32 * K, Shape(28, 1536, 8960, 12, 2, 128, 151_936)),
    _qwen25("3B", 3_090_000_000, 32 * K, Shape(36, 2048, 11_008, 16, 2, 128, 151_936)),
    _qwen25("7B", 7_610_000_000, 128 * K, Shape(28, 3584, 18_944, 28, 4, 128, 152_064)),
    _qwen3("0.6B", 596_049_920, 32 * K, Shape(28, 1024, 3072, 16, 8, 128, 151_936)),
    _qwen3("1.7B", 1_720_574_976, 32 * K, Shape(28, 2048, 6144, 16, 8, 128, 151_936)),
    _qwen3("4B", 4_022_468_096, 32 * K, Shape(36, 2560, 9728, 32, 8, 128, 151_936)),
    _qwen3("8B", 8_190_735_360, 128 * K, Shape(36, 4096, 12_288, 32, 8, 128, 151_936)),
    *_OTHERS,
)
# fmt: on


def find(name: str) -> KnownBase | None:
    """The base with this catalogue name or hub id (whatever the case), or None."""
    wanted = name.casefold()
    return next((base for base in BASES if wanted in (base.name, base.hub_id and base.hub_id.casefold())), None)


def nearest(name: str) -> tuple[str, ...]:
    """Up to three catalogue names that the user may have meant, the likeliest first."""
    names = {spelling.casefold(): base.name for base in BASES for spelling in (base.name, base.hub_id) if spelling}
    close = difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.6)
    return tuple(dict.fromkeys(names[spelling] for spelling in close))


_INTRO = """\
# Bases

Written by `python -m toolkit.bases.catalog > docs/bases.md`; a test keeps it true. Use a name from the first column as
`base: {model: NAME}`, or any hub id or folder: this list is a help, not a limit. A dash is a figure that was read in no
source; nothing here comes from memory. What a loaded config says otherwise is told when the base loads.

이름은 레시피의 `base: {model: 이름}`에 그대로 씁니다. 줄표(–)는 출처에서 확인하지 못한 값입니다.
상업 이용이 «no»인 모델로 만든 것은 상업적으로 쓸 수 없습니다. 라이선스 원문을 꼭 확인하세요.

- commercial: what the licence text permits as we read it; no legal advice.
- template: `marked` has generation markers, `unmarked` has none (Maltu masks turn by turn), `present`: there is one,
  its text was not read.
- LoRA, QLoRA: **our estimate**, not a source: GiB at the peak of a step in bf16 or nf4, rank 16, one row of 1,024
  tokens, without activation checkpointing and the CUDA context. The formula is `toolkit.bases.known.estimate_mb`.
- spoken: trained on spoken style, only where a source says so.
"""


def page() -> str:
    """The text of docs/bases.md."""
    heads = ("name", *FIGURES, "spoken", "LoRA", "QLoRA")
    rows = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    rows += ["| " + " | ".join(_cells(base)) + " |" for base in BASES]
    whole = sum(not gaps(base) for base in BASES)
    count = f"{whole} of {len(BASES)} rows have a source for each of: {', '.join(FIGURES)}.\n"
    return "\n".join([_INTRO, *rows, "", count, "## Sources", "", *(_sources_of(base) for base in BASES)])


def _cells(base: KnownBase) -> tuple[str, ...]:
    more = f" +{base.more_languages}" if base.more_languages else ""
    memory = (f"{size / 1024:.1f}" if size else "–" for size in (base.lora_mb, base.qlora_mb))
    return (
        f"`{base.name}`",
        " ".join(base.languages) + more if base.languages else "–",
        _short(base.parameters) if base.parameters else "–",
        base.licence or "–",
        _yes_no(base.commercial),
        f"{base.context:,}" if base.context else "–",
        base.template or "–",
        _yes_no(base.spoken),
        *memory,
    )


def _short(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 999.5e6 else f"{parameters / 1e6:.0f} M"


def _yes_no(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _sources_of(base: KnownBase) -> str:
    by_address: dict[Source, list[str]] = {}
    for figure, source in base.sources.items():
        by_address.setdefault(source, []).append(figure)
    where = f"[{base.hub_id}]({_HUB}{base.hub_id})" if base.hub_id else "shipped"
    remote = " Needs `trust_remote_code: true`." if base.remote_code else ""
    missing = f" Not read: {', '.join(gaps(base))}." if gaps(base) else ""
    lines = [f"- {', '.join(figures)}: <{source.url}> ({source.read})" for source, figures in by_address.items()]
    return "\n".join([f"### {base.name}", "", f"{where}.{remote}{missing} {base.note}".rstrip(), "", *lines, ""])


def main() -> None:
    """Write the page to standard output."""
    sys.stdout.write(page())


if __name__ == "__main__":
    main()
