"""craft deletes and replaces only what craft itself wrote, killed at whatever moment."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import failure, invoke, tree
from helpers import leftovers

import craft_cli as craft
from craft_cli.api.predict import predict_file
from craft_cli.errors import ConfigError, FileError
from craft_cli.files import (
    ADAPTER,
    MARKER,
    MERGED,
    Busy,
    check_inputs,
    delete_folder,
    foreign,
    hidden,
    locked,
    steadily,
    whole_file,
    whole_folder,
    write_bytes,
    write_marker,
)

DATA = ("--task", "sst2", "--data-dir", "data", "--model", "base", "--ranks", "6,5,2", "--max-steps", "1", "--use-cpu")


def write_folder(place: Path, *names: str, kind: str = MERGED, overwrite: bool = True) -> None:
    with whole_folder(place, kind, overwrite=overwrite) as folder:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{name} of {names}")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_replaced_without_what_craft_did_not_write() -> None:
    out = Path("out")
    write_folder(out, "a", "b", "sub/c")
    assert json.loads((out / MARKER).read_text()) == {"craft": MERGED, "files": ["a", "b", "sub/c"]}
    (out / "NOTES.md").write_text("mine")
    (out / "sub/mine").write_text("mine")
    (out / "onnx/deep").mkdir(parents=True)
    (out / "link").symlink_to("/nowhere")
    write_folder(out, "b", "d")
    assert files(out) == [MARKER, "NOTES.md", "b", "d", "sub/mine"]
    assert (out / "onnx/deep").is_dir()
    assert os.readlink(out / "link") == "/nowhere"
    assert foreign(out) == ["NOTES.md", "link", "onnx/deep", "sub/mine"]
    assert leftovers() == []


@pytest.mark.parametrize("mine", ["d", "sub", "sub/c/deep"])
def test_a_file_of_somebody_elses_in_the_way_is_refused(mine: str) -> None:
    out = Path("out")
    write_folder(out, "a")
    (out / mine).parent.mkdir(parents=True, exist_ok=True)
    (out / mine).write_text("mine")
    before = tree()
    with pytest.raises(FileError, match="is in the way and was not written by craft"):
        write_folder(out, "a", "d", "sub/c")
    assert tree() == before


def test_folders_that_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(Path("adapter"), "a", kind=ADAPTER)
    write_folder(Path("versioned"), "a")
    Path("versioned/.git").mkdir()
    Path("peft").mkdir()
    Path("peft/adapter_config.json").write_text("{}")
    Path("lying").mkdir()
    Path("lying", MARKER).write_text('{"craft": "a merged model", "files": "all"}')
    Path("file").write_text("")
    write_folder(Path("here"), "a")
    Path("here/below").mkdir()
    monkeypatch.chdir("here/below")
    for name, why in {
        "adapter": "holds an adapter", "versioned": "is a git repository", "peft": "did not write adapter_config.json",
        "lying": f"did not write {MARKER}", "file": "is a file", "here": "current folder or a parent of it", "here/below": "current folder",
    }.items():  # fmt: skip
        with pytest.raises(FileError, match=why):
            write_folder(Path("../..", name), "a")


def test_a_marker_that_leads_out_of_its_folder_is_not_believed() -> None:
    Path("mine").write_text("mine")
    Path("other").mkdir()
    Path("other/mine").write_text("mine")
    write_folder(Path("out"), "a")
    Path("out/way").symlink_to("../other")
    names = ["../mine", str(Path("mine").resolve()), "way/mine", "", ".", "a\0b"]
    write_marker(Path("out"), MERGED, names)
    delete_folder(Path("out"))
    assert Path("mine").exists()
    assert Path("other/mine").exists()


def test_links_stay_and_what_they_point_to_is_replaced() -> None:
    write_folder(Path("big/out"), "a")
    Path("out").symlink_to("big/out")
    write_folder(Path("out"), "b")
    assert (Path("out").is_symlink(), files(Path("big/out"))) == (True, [MARKER, "b"])
    Path("big/page.html").write_text("former")
    Path("page.html").symlink_to("big/page.html")
    write_bytes(Path("page.html"), b"new")
    assert (Path("page.html").is_symlink(), Path("big/page.html").read_text()) == (True, "new")
    Path("new.html").symlink_to("big/new.html")  # to nothing yet
    write_bytes(Path("new.html"), b"new")
    assert Path("big/new.html").read_text() == "new"


def test_permissions_are_kept_and_new_files_follow_the_umask() -> None:
    former = os.umask(0o027)
    try:
        write_bytes(Path("file"), b"")
        write_folder(Path("out"), "a")
        assert [stat.S_IMODE(Path(name).stat().st_mode) for name in ("file", "out", "out/a")] == [0o640, 0o750, 0o640]
        for name, mode in {"file": 0o604, "out": 0o705, "out/a": 0o604}.items():
            Path(name).chmod(mode)
        write_bytes(Path("file"), b"")
        write_folder(Path("out"), "a")
        assert [stat.S_IMODE(Path(name).stat().st_mode) for name in ("file", "out", "out/a")] == [0o604, 0o705, 0o604]
    finally:
        os.umask(former)


def test_streams_are_written_to_and_never_replaced() -> None:
    os.mkfifo("fifo")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(Path("fifo").read_bytes()))
    reader.start()
    write_bytes(Path("fifo"), b"page")
    reader.join()
    assert (got, Path("fifo").is_fifo()) == ([b"page"], True)
    Path("log").write_text("before\n")
    Path("stdout").symlink_to("/proc/self/fd/1")
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("log", os.O_WRONLY | os.O_APPEND), 1)
        for name in ("/dev/stdout", "stdout", "/dev/fd/1", "/dev/null"):
            write_bytes(Path(name), name.encode() + b"\n")
        os._exit(0)
    os.waitpid(pid, 0)
    assert Path("log").read_text() == "before\n/dev/stdout\nstdout\n/dev/fd/1\n"
    assert Path("/dev/null").is_char_device()


def test_a_file_is_not_written_over_a_folder_or_a_protected_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("folder").mkdir()
    with pytest.raises(FileError, match="it is a folder"):
        write_bytes(Path("folder"), b"")
    Path("file").write_text("mine")
    monkeypatch.setattr(os, "access", lambda *given: False)  # root may write everything
    with pytest.raises(FileError, match="write-protected"):
        write_bytes(Path("file"), b"")
    assert Path("file").read_text() == "mine"


def test_the_next_command_clears_away_what_killed_ones_left_and_nothing_else() -> None:
    mine = [".env.old", ".a.part", ".a.17.part", ".vimrc.old", ".a.craft-12.part"]
    for name in mine:
        Path(name).write_text("mine")
    write_folder(Path("cut"), "a")
    Path("cut").rename(hidden(Path("cut"), "old"))  # killed between two names
    hidden(Path("model"), "part").mkdir()
    hidden(Path("rows.jsonl"), "part").write_text("half")
    Path("other").mkdir()
    with whole_file(Path("at-work")):  # another process may
        write_bytes(Path("any"), b"")
        assert len([path for path in leftovers() if "craft-" in path.name and path.name not in mine]) == 1
    assert files(Path("cut")) == [MARKER, "a"]
    assert sorted(path.name for path in leftovers()) == sorted(mine)


def test_what_was_not_crafts_comes_home_from_a_former_folder() -> None:
    write_folder(Path("out"), "a", "b")
    Path("out/NOTES.md").write_text("mine")
    Path("out").rename(hidden(Path("out"), "old"))
    with pytest.raises(FileError, match="pass --overwrite"):
        write_folder(Path("out"), "c", overwrite=False)
    assert Path("out/NOTES.md").read_text() == "mine"


# -- commands ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("run")
def test_train_touches_no_folder_that_it_did_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("project/checkpoints/checkpoint-500").mkdir(parents=True)
    Path("project/checkpoints/checkpoint-500/pytorch_model.bin").write_text("weights")
    Path("project/thesis.tex").write_text("months of work")
    Path("project/recipe.yaml").write_text("model: base\n")
    assert "craft did not write" in failure("train", *DATA, "--output-dir", "project", "--overwrite")
    assert "has a recipe.yaml but no .craft.json" in failure("train", *DATA, "--output-dir", "project", "--resume")
    assert "contains the input data" in failure("train", *DATA, "--output-dir", ".", "--overwrite")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    other = [word.replace("data", "../data") if word == "data" else word for word in DATA]
    assert "current folder or a parent of it" in failure("train", *other, "--output-dir", ".", "--overwrite")


def test_overwrite_keeps_what_no_training_wrote(run: Path) -> None:
    def train(*more: str) -> None:
        assert invoke("train", *DATA, "--output-dir", "out", *more).exit_code == 0

    train()
    for name in ("NOTES.md", "adapter/NOTES.md", "tensorboard/mine", "checkpoints/step-1/mine", "checkpoints/mine"):
        Path("out", name).parent.mkdir(exist_ok=True)
        Path("out", name).write_text("mine")
    Path("out/tensorboard/events.out.tfevents.1").write_text("craft's")
    train("--overwrite")
    kept = [name for name in files(Path("out")) if Path("out", name).read_bytes() == b"mine"]
    assert kept == ["NOTES.md", "adapter/NOTES.md", "checkpoints/mine", "checkpoints/step-1/mine", "tensorboard/mine"]
    assert "tensorboard/events.out.tfevents.1" not in files(Path("out"))
    Path("out/adapter", MARKER).unlink()
    assert "adapter is in the way and was not written by craft" in failure(
        "train", *DATA, "--output-dir", "out", "--overwrite"
    )


@pytest.mark.usefixtures("run")
def test_an_output_that_is_an_input_is_refused() -> None:
    Path("texts.txt").write_text("great film\n")
    os.link("texts.txt", "hard.csv")
    Path("soft.csv").symlink_to("texts.txt")
    for output in ("texts.txt", "hard.csv", "soft.csv"):
        assert "is the input texts.txt" in failure(
            "predict", "run", "--input", "texts.txt", "--output", output, "--format", "csv"
        )
    os.link("data/validation.jsonl", "rows.jsonl")
    for output in ("data/train.jsonl", "rows.jsonl"):
        told = failure("eval", "run", "--task", "sst2", "--data-dir", "data", "--predictions", output, "--use-cpu")
        assert "; choose another path" in told
    Path("alias").symlink_to("base")
    for output in ("base", "alias", "run", "run/adapter"):
        assert "choose another" in failure("merge", "run", "-o", output, "--overwrite")
    with pytest.raises(ConfigError, match=r"contains the input base/config\.json"):
        check_inputs("--x", Path("base"), [Path("base/config.json")])


# -- two at once -------------------------------------------------------------------------------------------------------------


def test_a_reader_sees_one_state_of_a_folder_that_is_replaced_all_the_time() -> None:
    out, stop = Path("out"), threading.Event()

    def write() -> None:
        for number in range(100_000):
            with whole_folder(out, MERGED, overwrite=True) as folder:
                for name in ("a", "b"):
                    (folder / name).write_text(str(number))
            if stop.is_set():
                return

    def read() -> tuple[str, str]:
        try:
            return (out / "a").read_text(), (out / "b").read_text()
        except OSError as error:
            raise FileError(str(error)) from error

    with whole_folder(out, MERGED, overwrite=True) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [steadily(out, read) for _ in range(200)]
    finally:
        stop.set()
        writer.join()
    assert all(one == other for one, other in seen)


def test_a_lock_is_waited_for_and_the_wait_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(Path("lock")):
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    with pytest.raises(Busy), locked(Path("lock"), timeout=0):
        pass
    said = threading.Timer(1.5, release.set)
    said.start()
    with locked(Path("lock")):
        assert [record.getMessage() for record in caplog.records] == [
            "note: waiting for another process to release lock"
        ]
    holder.join()


def test_a_lock_that_is_a_link_is_refused_and_its_file_stays_as_it_is(run: Path) -> None:
    Path("key").write_text("my only key")
    Path("run/.lock").symlink_to("../key")
    assert invoke("inspect", "run").exit_code == 0
    with pytest.raises(OSError, match="Too many levels"), locked(Path("run/.lock")):
        pass
    assert Path("key").read_text() == "my only key"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(Path("lock"), timeout=0):
        write_bytes(Path("file"), b"")
    new, old = hidden(Path("file"), "part"), hidden(Path("file"), "part")
    for path in (new, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    write_folder(Path("out"), "a")
    assert leftovers() == [new]  # somebody may be writing it


# -- killed at every moment --------------------------------------------------------------------------------------------------


def killed_at(work: Callable[[], object], number: int) -> bool:
    """Run `work` in a child that is killed at its so many-th change of the file system; whether it came so far."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    count = 0

    def watched(event: str, arguments: object) -> None:
        nonlocal count
        if event in EVENTS or (event == "open" and arguments[2] & os.O_CREAT):  # type: ignore[index]
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watched)
    try:
        work()
    finally:
        os._exit(0)


COMMANDS = {
    "merge": (lambda: craft.merge("run", "out", overwrite=True), "out/model.safetensors"),
    "peft": (lambda: craft.merge("run", "out", overwrite=True, format="peft"), "out/adapter_model.safetensors"),
    "predict": (lambda: predict_file("run", input="in.txt", output="out.jsonl", use_cpu=True), "out.jsonl"),
    "decompose": (lambda: craft.decompose("base", ranks="6,5,2", cache_dir="cache", force=True), None),
    "train": (lambda: invoke("train", *DATA, "--output-dir", "out", "--overwrite"), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_killed_loses_nothing_and_is_repeated(command: str, run: Path) -> None:
    """KILL_EVERY=1 tries every change of the file system; by default some of them."""
    work, product = COMMANDS[command]
    moment, step, kills = 1, int(os.environ.get("KILL_EVERY", "5" if command in ("predict", "decompose") else "17")), 0
    Path("in.txt").write_text("good film\n")
    work()
    if command != "predict":
        Path("out").mkdir(exist_ok=True)
        Path("out/NOTES.md").write_text("mine")
    while killed_at(work, moment):
        kills, moment = kills + 1, moment + step
        assert product is None or Path(product).is_file() or list(Path().glob(".out.craft-*.old")), moment
        work()
        assert product is None or Path(product).is_file(), moment
        assert command == "predict" or Path("out/NOTES.md").read_text() == "mine", moment
        assert leftovers() == [], moment
    print(f"{command}: {kills} kills")
    assert kills > 1


EVENTS = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.chmod",
    "os.symlink",
    "fcntl.flock",
    "shutil.rmtree",
}


def test_a_folder_whose_replacing_is_killed_anywhere_is_whole_and_keeps_what_is_not_crafts() -> None:
    out, moments = Path("out"), 0
    write_folder(out, "a", "b")
    (out / "NOTES.md").write_text("mine")
    while killed_at(lambda: write_folder(out, "a", "c"), moments + 1):
        moments += 1
        write_bytes(Path("page.html"), b"the next command")
        former = [MARKER, "NOTES.md", "a", "b"]
        assert files(out) in (former, [MARKER, "NOTES.md", "a", "c"]), moments
        assert [path for path in leftovers() if path.name != ".lock"] == []
        write_folder(out, "a", "b")
        assert files(out) == former
    assert moments > 20
