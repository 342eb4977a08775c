"""What the tests of encoders share: tiny random BERTs made on the spot, Korean texts with labels, and their recipe."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

LABELS = ("긍정", "부정", "중립")
WORDS = {"긍정": ("좋다", "기쁘다"), "부정": ("싫다", "슬프다"), "중립": ("그렇다", "보통이다")}
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 48, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 48, "pad_token_id": 0}
MODERN = {key: value for key, value in SIZES.items() if "dropout" not in key} | {
    "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
KINDS: dict[str, Any] = {
    "bert": lambda n: BertConfig(vocab_size=n, **SIZES),
    "roberta": lambda n: RobertaConfig(vocab_size=n, **SIZES),
    "distilbert": lambda n: DistilBertConfig(vocab_size=n, **DISTIL),
    "deberta": lambda n: DebertaV2Config(vocab_size=n, **SIZES),
    "modernbert": lambda n: ModernBertConfig(vocab_size=n, **MODERN),
}


def texts() -> list[tuple[str, str]]:
    """90 different texts, of each label 30."""
    found = []
    for number in range(90):
        label = LABELS[number % 3]
        found.append((f"{number * 37 % 101}번은 정말 {WORDS[label][number // 3 % 2]}", label))
    return found


def word_pieces() -> Any:
    """A WordPiece tokenizer that knows the signs of `texts`, each alone and inside a word."""
    signs = sorted({sign for text, _ in texts() for sign in text if not sign.isspace()})
    known = {piece: place for place, piece in enumerate([*MARKS, *signs, *(f"##{sign}" for sign in signs)])}
    tokenizer = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save_encoder(folder: Path, kind: str = "bert", labels: int | None = None, dropout: float = 0.1) -> Path:
    """A tiny random encoder as masked words were learned, or with a head for so many labels."""
    tokenizer = word_pieces()
    config = KINDS[kind](len(tokenizer))
    if kind == "bert":
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if labels is None:
            model: Any = AutoModelForMaskedLM.from_config(config)
        else:
            config.num_labels = labels
            model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def label_file(path: Path) -> Path:
    """The texts as jsonl, their labels as numbers."""
    rows = [{"글": text, "답": LABELS.index(label)} for text, label in texts()]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def encoder_recipe(folder: Path, encoder: Path, **more: str) -> Path:
    """A recipe that trains a few steps in a second or two; `more`: sections in YAML instead of the ones here."""
    names = ", ".join(f"{number}: {label}" for number, label in enumerate(LABELS))
    labels = f"{{kind: labels, text: 글, label: 답, names: {{{names}}}, template: '{{text}}\\n느낌:'}}"
    data = f"{{train: ['{label_file(folder / '글.jsonl')}'], format: {labels}, clean: {{near_duplicates: null}}}}"
    sections = {
        "name": "읽기",
        "task": "classify",
        "base": f"{{model: '{encoder}'}}",
        "data": data.replace("'{text}\\n느낌:'", '"{text} 정말"'),
        "adapter": "{kind: lora, rank: 4, dropout: 0.1}",
        "train": "{max_steps: 12, batch_size: 8, learning_rate: 0.01, evaluate_every: 0.5, early_stop_patience: null}",
        "track": "[]",
    }
    path = folder / "읽기.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in (sections | more).items()), encoding="utf-8")
    return path
