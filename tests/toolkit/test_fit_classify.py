"""An encoder learns labels: which bases are one, what a run keeps, what it says, and that a kill costs nothing."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from tests.encoder_world import LABELS, encoder_recipe, label_file, save_encoder, texts
from toolkit.__main__ import main as maltu
from toolkit.adapters.lora import LoraKind, attach_labelling
from toolkit.bases.encoder import is_encoder, is_encoder_config, load_encoder
from toolkit.card import show_result
from toolkit.combine.vote import vote_labels
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import AdapterError, BaseError, DataError, InputError, RunError
from toolkit.evaluate.classify import common_labels, label_log_likelihoods
from toolkit.evaluate.encoder import encode, encoder_label_logprobs, label_logprobs
from toolkit.fit.classify import CollateTexts, held_out_log_loss
from toolkit.loaded import load_labeller, load_run
from toolkit.recipe.model import Base, Lora
from toolkit.track import read_metrics
from toolkit.train import main as train

TEXTS = [text for text, _ in texts()]


def talks(n: int = 6) -> list[Talk]:
    return [Talk((Turn("user", text), Turn("assistant", label)), f"글:{text}", label) for text, label in texts()[:n]]


def facts(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("base") / "작은 버트")


class TestWhatIsOne:
    @pytest.mark.parametrize(
        ("config", "is_one"),
        [
            ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, True),
            ({"model_type": "bert", "architectures": ["BertModel"]}, True),
            ({"model_type": "bert"}, True),
            ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForSequenceClassification"]}, True),
            ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, False),
            ({"model_type": "bert", "is_decoder": True}, False),
            ({"model_type": "roberta", "architectures": ["RobertaForCausalLM"]}, False),
            ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, False),
            ({"model_type": "llama", "architectures": ["LlamaModel"]}, False),
            ({"model_type": "bart", "architectures": ["BartModel"], "is_encoder_decoder": True}, False),
            ({}, False),
        ],
    )
    def test_its_config_says_so(self, config: dict[str, Any], is_one: bool) -> None:
        assert is_encoder_config(config) == is_one

    def test_a_folder_is_one(self, bert: Path, tmp_path: Path) -> None:
        assert is_encoder(Base(model=str(bert))) and not is_encoder(Base(model="spoken-mini"))
        LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
        assert not is_encoder(Base(model=str(tmp_path)))


class TestLoading:
    @pytest.mark.parametrize(
        ("kind", "head", "context"),
        [
            ("bert", ("bert.pooler", "classifier"), 48),
            ("roberta", ("classifier",), 47),  # the first positions of its table are kept for padding (pad id 0)
            ("distilbert", ("classifier", "pre_classifier"), 48),
            ("deberta", ("classifier", "pooler"), 48),
            ("modernbert", ("classifier", "head"), 48),
        ],
    )
    def test_the_head_is_what_lies_between_encoder_and_labels(
        self, kind: str, head: tuple[str, ...], context: int, tmp_path: Path
    ) -> None:
        folder = save_encoder(tmp_path / kind, kind)
        base = load_encoder(Base(model=str(folder)), LABELS, "cpu", torch.float32, seed=3)
        again = load_encoder(Base(model=str(folder)), LABELS, "cpu", torch.float32, seed=3)
        other = load_encoder(Base(model=str(folder)), LABELS, "cpu", torch.float32, seed=4)
        assert (base.head, base.context, base.labels) == (head, context, LABELS)
        row = torch.tensor([encode(base.tokenizer, TEXTS[:1])[0]])
        with torch.no_grad():
            one, same, unlike = (of.model(input_ids=row).logits for of in (base, again, other))
        assert torch.equal(one, same) and not torch.equal(one, unlike) and one.shape == (1, 3)

    def test_a_head_of_other_labels_is_made_anew(self, tmp_path: Path) -> None:
        folder = save_encoder(tmp_path / "다섯", labels=5)
        base = load_encoder(Base(model=str(folder)), LABELS, "cpu", torch.float32, seed=3)
        assert base.model.config.num_labels == 3 and base.head == ("classifier",)

    def test_missing_tensors_of_the_encoder_are_named(self, bert: Path, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        folder = save_encoder(tmp_path / "torn")
        tensors = load_file(folder / "model.safetensors")
        del tensors["bert.encoder.layer.0.attention.self.query.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BaseError, match=r"lack tensors of the encoder \(bert\.encoder\.layer\.0"):
            load_encoder(Base(model=str(folder)), LABELS, "cpu", torch.float32, seed=0)

    def test_what_is_refused_says_why(self, bert: Path) -> None:
        with pytest.raises(BaseError, match="not held in 4 bits"):
            load_encoder(Base(model=str(bert), quantize="nf4"), LABELS, "cpu", torch.float32, seed=0)
        with pytest.raises(BaseError, match="LlamaForCausalLM is no encoder"):
            load_encoder(Base(model="spoken-mini"), LABELS, "cpu", torch.float32, seed=0)


@pytest.mark.slow  # importing peft takes five seconds
class TestAdapter:
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # plain PEFT's own
    @pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta", "modernbert"])
    def test_saved_and_loaded_it_says_the_same_in_plain_peft_too(self, kind: str, tmp_path: Path) -> None:
        named = Base(model=str(save_encoder(tmp_path / kind, kind)))
        base = load_encoder(named, LABELS, "cpu", torch.float32, seed=3)
        model = attach_labelling(base.model, Lora(rank=2), seed=3, head=base.head)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        rows = encode(base.tokenizer, TEXTS[:4])
        wanted = label_logprobs(model, rows, 0)
        folder = tmp_path / "adapter"
        folder.mkdir()
        LoraKind().save(model, folder, base="이것", base_hash=base.hash)
        fresh = load_encoder(named, LABELS, "cpu", torch.float32, seed=99)
        loaded = LoraKind().load(fresh.model, folder, base_hash=fresh.hash)
        assert torch.equal(label_logprobs(loaded, rows, 0), wanted)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

        import peft

        plain: Any = AutoModelForSequenceClassification.from_pretrained(named.model, num_labels=3)
        opened = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
        assert torch.equal(label_logprobs(opened, rows, 0), wanted)

    def test_lora_and_the_head_learn_and_nothing_else(self, bert: Path) -> None:
        base = load_encoder(Base(model=str(bert)), LABELS, "cpu", torch.float32, seed=0)
        model = attach_labelling(base.model, Lora(rank=2), seed=0, head=base.head)
        learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all("lora_" in name or "modules_to_save" in name for name in learns)
        assert any("classifier.modules_to_save" in name for name in learns)
        assert any("bert.pooler.modules_to_save" in name for name in learns)
        assert not any("lora_" in name and ("pooler" in name or "classifier" in name) for name in learns)
        assert any("query.lora_A" in name for name in learns) and any("output.dense.lora_A" in name for name in learns)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (Lora(init="pissa"), "pissa is not for an encoder"),
            (Lora(targets=("classifier",)), "'classifier' is of the head"),
            (Lora(targets=("query", "qvery")), "'qvery' names no layer"),
        ],
    )
    def test_options_that_do_not_fit(self, options: Lora, says: str, bert: Path) -> None:
        base = load_encoder(Base(model=str(bert)), LABELS, "cpu", torch.float32, seed=0)
        with pytest.raises(AdapterError, match=says):
            attach_labelling(base.model, options, seed=0, head=base.head)


class TestScoring:
    def test_log_probabilities_are_those_of_each_text_alone(self, bert: Path) -> None:
        base = load_encoder(Base(model=str(bert)), LABELS, "cpu", torch.float32, seed=3)
        rows = encode(base.tokenizer, [*TEXTS[:5], "좋다"])
        base.model.train()
        found = label_logprobs(base.model, rows, 0, batch_tokens=40)
        assert base.model.training
        base.model.eval()
        for row, of in zip(rows, found, strict=True):
            with torch.no_grad():
                alone = base.model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
            torch.testing.assert_close(of, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(6, dtype=torch.float64))
        gold = [0, 1, 2, 0, 1, 0]
        loss = held_out_log_loss(base.model, [(ids, [label]) for ids, label in zip(rows, gold, strict=True)], 0)
        assert loss == pytest.approx(-sum(of[label].item() for of, label in zip(found, gold, strict=True)) / 6)

    def test_no_texts_have_no_labels_and_an_empty_row_is_refused(self, bert: Path) -> None:
        base = load_encoder(Base(model=str(bert)), LABELS, "cpu", torch.float32, seed=3)
        assert label_logprobs(base.model, [], 0).shape == (0, 3)
        with pytest.raises(InputError, match="row 1: has no tokens"):
            label_logprobs(base.model, [[2, 3], []], 0)

    def test_a_batch_is_filled_up_on_the_right_and_counts_what_is_not_padding(self) -> None:
        batch = CollateTexts(7)([{"input_ids": [1, 2, 3], "labels": [2]}, {"input_ids": [4], "labels": [0]}])
        assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]] and batch["labels"].tolist() == [2, 0]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and int(batch["n_tokens"]) == 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A run that learned the labels."""
    folder = tmp_path_factory.mktemp("trained")
    steps = "{max_steps: 100, batch_size: 8, learning_rate: 0.01, evaluate_every: 2, early_stop_patience: null}"
    recipe = encoder_recipe(folder, bert, train=steps)
    assert train([str(recipe), "--runs", str(folder), "--quiet"]) == 0
    return folder / "읽기"


@pytest.mark.slow
def test_check_says_what_an_encoder_would_learn(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    recipe = encoder_recipe(tmp_path, bert)
    assert maltu(["check", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "긍정, 부정, 중립" in out and "0.0% of the tokens" in out and "12 (9 an epoch)" in out
    assert maltu(["check", str(recipe), "adapter={kind: reft}"]) == 2


@pytest.mark.slow
class TestRun:
    def test_it_learns_and_says_so_beside_the_baselines(self, trained: Path) -> None:
        after = facts(trained)["results"]["after"]
        assert after["accuracy"]["all"] >= 0.9 > after["baselines"]["majority accuracy"]
        assert {"accuracy", "macro f1", "log loss", "calibration error", "confusion", "baselines"} == set(after)
        assert "naive Bayes macro f1" in after["baselines"] and facts(trained)["results"]["before"] == {}
        assert (facts(trained)["labels"], facts(trained)["base"]["kind"]) == (list(LABELS), "encoder")
        assert facts(trained)["fit"]["best_loss"] < 0.7 and "| 긍정 |" in (trained / "samples.md").read_text()
        losses = [row["loss"] for row in read_metrics(trained) if "loss" in row]
        assert losses[0] == pytest.approx(1.1, abs=0.5) and losses[-1] < losses[0] / 2

    def test_card_and_terminal_send_nobody_to_chat(self, trained: Path) -> None:
        from toolkit.bundle import Run

        file = io.StringIO()
        show_result(Run(trained), Console(file=file, width=160))
        card = (trained / "README.md").read_text(encoding="utf-8")
        for text in (card, file.getvalue()):
            assert "toolkit chat" not in text and "-m serve" not in text and "evaluate" in text and "accuracy" in text

    def test_opened_again_it_labels_as_it_was_trained(self, trained: Path) -> None:
        loaded = load_labeller(trained, "cpu")
        held = facts(trained)["results"]["after"]
        found = encoder_label_logprobs(loaded, [f"{text} 정말" for text in TEXTS])
        gold = torch.tensor([LABELS.index(label) for _, label in texts()])
        assert loaded.labels == LABELS and found.shape == (90, 3)
        assert float((found.argmax(-1) == gold).double().mean()) >= 0.9 and held["log loss"]["all"] < 0.7
        with pytest.raises(InputError, match=r"text 1: has 1\d\d tokens; the encoder reads 48"):
            encoder_label_logprobs(loaded, ["좋다", "좋다 " * 60])

    def test_it_cannot_talk_and_says_so(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(RunError, match="it labels texts; it cannot talk"):
            load_run(trained, "cpu")
        assert maltu(["chat", str(trained)]) == 2
        assert "it labels texts; it cannot talk" in capsys.readouterr().err

    def test_a_run_that_talks_is_no_labeller(self, tmp_path: Path) -> None:
        from toolkit.bundle import Run

        Run(tmp_path).update(status="finished", base={"model": "spoken-mini"}, labels=list(LABELS))
        with pytest.raises(RunError, match="not a run of an encoder"):
            load_labeller(tmp_path)

    def test_evaluate_measures_other_texts(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "160")
        other = label_file(tmp_path / "다른.jsonl")
        long = json.dumps({"글": "좋다 " * 60, "답": 0}, ensure_ascii=False)
        other.write_text("\n".join([*other.read_text(encoding="utf-8").splitlines()[:9], long]), encoding="utf-8")
        assert maltu(["evaluate", str(trained), "--data", str(other), "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert "Measured on 9 of 10 conversations; dropped: too_long 1." in out
        assert "calibration error" in out and "naive Bayes" not in out

    def test_another_base_under_the_same_name_is_refused(self, bert: Path, tmp_path: Path) -> None:
        folder = save_encoder(tmp_path / "base")
        recipe = encoder_recipe(tmp_path, folder, train="{max_steps: 1, batch_size: 2}")
        assert train([str(recipe), "--runs", str(tmp_path), "--quiet"]) == 0
        config = BertConfig.from_pretrained(folder)
        config.layer_norm_eps = 0.5
        config.save_pretrained(folder)
        with pytest.raises(BaseError, match="not the base that"):
            load_labeller(tmp_path / "읽기", "cpu")

    def test_small_batches_learn_what_one_large_batch_does(self, tmp_path: Path) -> None:
        base = save_encoder(tmp_path / "dry", dropout=0.0)
        recipe = encoder_recipe(tmp_path, base, adapter="{kind: lora, rank: 4}")
        found = {}
        for micro in (8, 2):
            few = ["train.max_steps=3", f"train.micro_batch={micro}", f"name=m{micro}"]
            assert train([str(recipe), *few, "--runs", str(tmp_path), "--quiet"]) == 0
            found[micro] = [row["loss"] for row in read_metrics(tmp_path / f"m{micro}") if "loss" in row]
        assert found[8] == pytest.approx(found[2], rel=1e-4) and len(found[8]) == 3

    def test_what_an_encoder_has_no_use_for_is_refused_all_at_once(
        self, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe = encoder_recipe(tmp_path, bert, adapter="{kind: reft}", train="{packing: true}")
        assert train([str(recipe), "data.system=너는 친구야", "--runs", str(tmp_path)]) == 2
        err = capsys.readouterr().err
        for key in ("adapter.kind", "data.system", "train.packing"):
            assert key in err
        assert not (tmp_path / "읽기").exists()

    def test_too_many_texts_over_the_length_stop_the_run(
        self, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe = encoder_recipe(tmp_path, bert, train="{max_length: 8, max_steps: 1}")
        assert train([str(recipe), "--runs", str(tmp_path)]) == 2
        assert "texts have more than 8 tokens" in capsys.readouterr().err

    def test_patience_ends_it_and_the_best_stays(self, bert: Path, tmp_path: Path) -> None:
        hopeless = "{max_steps: 60, batch_size: 8, learning_rate: 0.5, evaluate_every: 0.2, early_stop_patience: 2}"
        recipe = encoder_recipe(tmp_path, bert, train=hopeless)
        assert train([str(recipe), "--runs", str(tmp_path), "--quiet"]) == 0
        fit = facts(tmp_path / "읽기")["fit"]
        assert fit["stopped"] == "early" and fit["steps"] < 60 and fit["best_step"] < fit["steps"]


DRIVER = """
import os, signal, sys
from toolkit.fit import watch
watch.CHECKPOINT_S = watch.SAVE_SHARE = 0.0
before = watch.Watch.on_step_end
def on_step_end(self, args, state, control, **more):
    before(self, args, state, control, **more)
    if state.global_step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
watch.Watch.on_step_end = on_step_end
from toolkit.train import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_of_one_that_never_stopped(bert: Path, tmp_path: Path) -> None:
    recipe = encoder_recipe(tmp_path, bert)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(name: str, step: int) -> int:
        command = [sys.executable, "-c", DRIVER, str(step), str(recipe), f"name={name}", "--runs", str(tmp_path)]
        done = subprocess.run([*command, "--quiet"], env=environment, check=False, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert start("whole", 0) == 0
    assert start("killed", 7) == -signal.SIGKILL
    assert list((tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert start("killed", 0) == 0
    one, other = (
        load_file(tmp_path / name / "adapters/main/adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    steps = [row["step"] for row in read_metrics(tmp_path / "killed") if "loss" in row]
    assert steps == list(range(1, 13))


class TestVotes:
    def test_runs_of_other_labels_are_refused_by_name(self) -> None:
        assert common_labels({"a": ("나", "가"), "b": ("가", "나")}) == ("나", "가")
        with pytest.raises(DataError, match=r"a: does not know 다(.|\n)*b: does not know 나") as caught:
            common_labels({"a": ("가", "나"), "b": ("가", "다")})
        assert "only runs that choose from the same labels can vote" in str(caught.value)

    @pytest.mark.slow
    def test_a_run_that_talks_and_an_encoder_vote_together(self, trained: Path, tmp_path: Path) -> None:
        recipe = encoder_recipe(
            tmp_path, Path("spoken-mini"), train="{max_steps: 2, batch_size: 2}", name="말", base="{model: spoken-mini}"
        )
        assert train([str(recipe), "--runs", str(tmp_path), "--quiet"]) == 0
        runs = load_run(tmp_path / "말", "cpu"), load_labeller(trained, "cpu")
        loglik_KRL = torch.stack([label_log_likelihoods(run, talks(), LABELS) for run in runs])
        assert loglik_KRL.shape == (2, 6, 3) and loglik_KRL.dtype == torch.float64
        alone = encoder_label_logprobs(load_labeller(trained, "cpu"), [talk.turns[0].content for talk in talks()])
        assert torch.allclose(loglik_KRL[1], alone)
        voted = vote_labels(loglik_KRL, "soft", [0.0, 1.0])
        assert torch.equal(voted.choice_R, alone.argmax(-1))


def test_a_chat_on_an_encoder_is_told_what_it_is_for(
    bert: Path, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([str(recipe_file), f"base.model={bert}", "--runs", str(tmp_path)]) == 2
    assert "An encoder labels texts: task: classify" in capsys.readouterr().err
