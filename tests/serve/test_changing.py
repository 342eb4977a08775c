"""Runs that come and go on a real engine: nobody who is being answered notices, and what does not fit is refused."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.engines import changing
from serve.engines.contract import Ask, One
from serve.engines.models import open_models
from serve.engines.rows import RowsEngine
from serve.refusal import Refusal
from toolkit.bundle import Run, open_run
from toolkit.corpus.talk import Turn
from toolkit.generate import Sampling

pytestmark = pytest.mark.slow  # loads a base and adapters

LUNCH = (Turn("user", "오늘 뭐 먹지?"),)


@pytest.fixture(scope="module")
def folder(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder of this module's own."""
    return Path(shutil.copytree(runs, tmp_path_factory.mktemp("changing") / "runs"))


@pytest.fixture
def engine(folder: Path) -> Iterator[RowsEngine]:
    engine = RowsEngine(open_models([open_run(folder / "casual")], "cpu"), n_slots=4, n_queue=16)
    yield engine
    engine.close()


def copy(folder: Path, name: str, of: str = "polite") -> Run:
    if (folder / name).exists():
        shutil.rmtree(folder / name)
    return open_run(shutil.copytree(folder / of, folder / name))


def scale(run: Run, factor: float) -> Run:
    """The run with an effect that is so many times its own."""
    from safetensors.torch import load_file, save_file

    (file,) = run.adapter().glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor * factor if "lora_B" in name else tensor for name, tensor in tensors.items()}, file)
    return run


def ask(name: str, n_tokens: int = 12) -> Ask:
    return Ask("id", One(name), LUNCH, Sampling(temperature=0.0, max_tokens=n_tokens))


async def said(engine: RowsEngine, name: str, n_tokens: int = 12) -> str:
    return "".join([piece async for piece in await engine.submit(ask(name, n_tokens))])


async def refused(engine: RowsEngine, add: Run | None, remove: str | None = None) -> Refusal:
    before = (set(engine.models()), set(engine._slots.stack.slots))  # type: ignore[union-attr]
    with pytest.raises(Refusal) as raised:
        await engine.change(add, remove)
    assert (set(engine.models()), set(engine._slots.stack.slots)) == before  # type: ignore[union-attr]
    return raised.value


def test_a_loaded_run_answers_as_it_does_from_the_start(engine: RowsEngine, folder: Path) -> None:
    async def run() -> None:
        await engine.change(open_run(folder / "polite"), None)
        from_start = RowsEngine(open_models([open_run(folder / "polite")], "cpu"))
        try:
            assert await said(engine, "polite") == await said(from_start, "polite") != await said(engine, "casual")
        finally:
            from_start.close()
        assert list(engine.models()) == ["base", "casual", "polite"]

    asyncio.run(run())


def test_a_reload_leaves_those_who_are_answered_at_the_version_they_began_with(
    engine: RowsEngine, folder: Path
) -> None:
    async def run() -> None:
        one = copy(folder, "voice")
        await engine.change(one, None)
        before, old_hash = await said(engine, "voice", 40), engine.models()["voice"].weights_hash
        reply = await engine.submit(ask("voice", 40))
        pieces = aiter(reply)
        text = await anext(pieces)
        await engine.change(scale(one, -1.0), "voice")
        after = await said(engine, "voice", 40)
        async for piece in pieces:
            text += piece
        assert text == before != after and engine.models()["voice"].weights_hash != old_hash
        assert await said(engine, "voice", 40) == after
        assert set(engine._slots.stack.slots) == {"casual", "voice (2)"}  # type: ignore[union-attr]

    asyncio.run(run())


def test_answers_go_on_while_a_run_is_read(engine: RowsEngine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    was_answered = threading.Event()
    read_run = changing.read_run

    def read(*given: Any) -> Any:
        assert was_answered.wait(60)
        return read_run(*given)

    monkeypatch.setattr(changing, "read_run", read)

    async def run() -> None:
        loading = asyncio.create_task(engine.change(open_run(folder / "polite"), None))
        assert await asyncio.wait_for(said(engine, "casual", 40), 50)
        assert not loading.done() and "polite" not in engine.models()
        was_answered.set()
        await loading
        assert await said(engine, "polite")

    asyncio.run(run())


def test_an_unloaded_run_ends_its_answers_and_is_gone(engine: RowsEngine, folder: Path) -> None:
    async def run() -> None:
        await engine.change(open_run(folder / "polite"), None)
        whole = await said(engine, "polite", 40)
        reply = await engine.submit(ask("polite", 40))
        await engine.change(None, "polite")
        with pytest.raises(Refusal) as missing:
            await engine.submit(ask("polite"))
        assert missing.value.status == 404
        assert "".join([piece async for piece in reply]) == whole
        await said(engine, "casual")
        assert set(engine._slots.stack.slots) == {"casual"}  # type: ignore[union-attr]

    asyncio.run(run())


def test_many_reloads_under_load_answer_everybody_by_one_version_or_the_other(engine: RowsEngine, folder: Path) -> None:
    async def run() -> None:
        one, other = copy(folder, "a-voice"), scale(copy(folder, "b-voice"), -1.0)
        texts = set()
        for version in (one, other):
            await engine.change(open_run(version.path), None)
            texts.add(await said(engine, version.name, 24))
        await engine.change(None, "b-voice")
        (file,) = one.adapter().glob("*.safetensors")
        files = [file.read_bytes(), next(other.adapter().glob("*.safetensors")).read_bytes()]

        async def keep_asking() -> list[str]:
            return [await said(engine, "a-voice", 24) for _ in range(6)]

        async def keep_changing() -> None:
            for n in range(8):
                file.write_bytes(files[(n + 1) % 2])
                await engine.change(one, "a-voice")

        found = await asyncio.gather(*(keep_asking() for _ in range(4)), keep_changing())
        assert {text for part in found if part for text in part} <= texts and len(texts) == 2
        assert engine.load().n_failures == 0 and len(engine._slots.stack.slots) == 2  # type: ignore[union-attr]

    asyncio.run(run())


def test_a_run_that_changes_nothing_is_refused(engine: RowsEngine, folder: Path) -> None:
    refusal = asyncio.run(refused(engine, copy(folder, "idle", of="casual")))
    assert (refusal.status, refusal.code) == (400, "run_unfit") and "changes nothing" in refusal.message


def test_a_run_on_another_base_is_refused(engine: RowsEngine, folder: Path, facts_writer: Callable[..., Path]) -> None:
    refusal = asyncio.run(refused(engine, open_run(facts_writer(folder / "foreign", "c" * 64))))
    assert "another base" in refusal.message


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("infinite", lambda tensors: {name: tensor * float("inf") for name, tensor in tensors.items()}, "not finite"),
        ("partly", lambda tensors: {f"{name}.x": tensor for name, tensor in tensors.items()}, ""),
        ("half", lambda tensors: dict(list(tensors.items())[1:]), ""),
        ("huge", lambda tensors: tensors | {"x": __import__("torch").zeros(6_000_000)}, "more than its base"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    engine: RowsEngine, folder: Path, name: str, change: Callable[[Any], Any], says: str
) -> None:
    from safetensors.torch import load_file, save_file

    run = copy(folder, name)
    (file,) = run.adapter().glob("*.safetensors")
    save_file(change(load_file(file)), file)
    refusal = asyncio.run(refused(engine, run))
    assert refusal.status == 400 and says in refusal.message


def test_a_damaged_or_pickled_adapter_is_refused(engine: RowsEngine, folder: Path) -> None:
    torn = copy(folder, "torn")
    (file,) = torn.adapter().glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert asyncio.run(refused(engine, torn)).status == 400
    pickled = copy(folder, "pickled")
    (file,) = pickled.adapter().glob("*.safetensors")
    file.rename(file.with_name("adapter_model.bin")).write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    assert asyncio.run(refused(engine, pickled)).status == 400 and not Path("/tmp/pwned").exists()


def test_names_that_are_no_loaded_run_are_refused(engine: RowsEngine) -> None:
    for name in ("base", "nobody", "casual/x"):
        assert asyncio.run(refused(engine, None, name)).status == 404


def test_a_failed_reload_leaves_the_old_version(engine: RowsEngine, folder: Path) -> None:
    async def run() -> None:
        one = copy(folder, "kept")
        await engine.change(one, None)
        before = await said(engine, "kept")
        await refused(engine, scale(one, float("nan")), "kept")
        assert await said(engine, "kept") == before

    asyncio.run(run())
