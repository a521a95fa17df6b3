"""Archives say what the folders say, and nothing that an archive holds can do harm."""

from __future__ import annotations

import io
import random
import stat
import zipfile
from pathlib import Path

import pytest

from acktr.cli.main import main
from acktr.report import archives
from acktr.report.archives import pack, read_archive, unpacked
from acktr.report.page import ReportSettings, write_report
from acktr.report.references import Reference
from tests.tools.run_folders import write_run


def campaign(root: Path) -> Path:
    for env in ("Hopper-v5", "Ant-v5"):
        for label in ("acktr", "a2c"):
            for seed in range(3):
                write_run(root, env, label, seed, [seed + k / 9 for k in range(150)])
    return root


def packed(folder: Path, target: Path) -> Path:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    target.write_bytes(pack({name: data for name, data in files.items() if data}))
    return target


def test_a_report_of_an_archive_is_that_of_the_folders(tmp_path: Path) -> None:
    runs = campaign(tmp_path / "runs")
    archive = packed(runs, tmp_path / "runs.zip")
    settings = ReportSettings({"Ant": Reference("Ant", 0.0, 9.0, (1.5,), "")}, resamples=100)
    for paths, name in (
        ([runs], "folders"),
        ([archive], "archive"),
        ([archive / "Hopper-v5", archive / "Ant-v5" / "acktr", runs / "Ant-v5" / "a2c"], "parts"),
    ):
        write_report(paths, tmp_path / name, settings, ["acktr", "report"])
    folders, archived, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("folders", "archive", "parts")
    )
    assert folders == archived == parts and len(folders) == 9
    for run in (runs, archive):
        out = tmp_path / f"{run.name}.svg"
        assert main(["plot", str(run / "Ant-v5" / "acktr" / "seed0"), "--out", str(out)]) == 0
    assert (tmp_path / "runs.svg").read_bytes() == (tmp_path / "runs.zip.svg").read_bytes()


def test_archives_stay_in_their_order(tmp_path: Path) -> None:
    """Which plots and their tables have the runs in."""
    archives = [tmp_path / f"{name}.zip" for name in "gfedcba"]
    for path in archives:
        path.write_bytes(pack({"Ant-v5/acktr/seed0/config.json": b"{}"}))
    with unpacked(archives) as folders:
        assert folders == sorted(folders)
        assert [folder.name for folder in folders] == [path.name for path in archives]


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    files = {"b/c": b"1" * 100, "a": b""}
    data = pack(files)
    assert data == pack(dict(reversed(files.items())))
    (tmp_path / "x.zip").write_bytes(data)
    assert read_archive(tmp_path / "x.zip") == files
    with unpacked([tmp_path / "x.zip" / "b"]) as (folder,):
        assert [path.name for path in folder.iterdir()] == ["c"]
    assert not folder.exists()


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes], method: int = 8) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def lying(size: int) -> bytes:
    """An archive of one file of a million zeros that says it has ``size`` bytes."""
    data, told = zipped(("a", b"\0" * 1_000_000)), (1_000_000).to_bytes(4, "little")
    assert data.count(told) == 2
    return data.replace(told, size.to_bytes(4, "little"))


def encrypted() -> bytes:
    data = bytearray(zipped(("a", b"x")))
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not an archive of runs"),
        (b"PK\3\4 and so on", "not an archive of runs"),
        (zipped(("a", b"1" * 99))[:-30], "not an archive of runs"),
        (zipped(("../a", b"")), "'../a' leads elsewhere"),
        (zipped(("a/../../b", b"")), "leads elsewhere"),
        (zipped(("/etc/a", b"")), "leads elsewhere"),
        (zipped(("C:a", b"")), "leads elsewhere"),
        (zipped(("a\\b", b"")), "leads elsewhere"),
        (zipped(("a//b", b"")), "leads elsewhere"),
        (zipped(("a\nb", b"")), "leads elsewhere"),
        (zipped(("a" * 501, b"")), "leads elsewhere"),
        (zipped(("a", b"1"), ("a/b", b"2")), "cannot unpack"),
        (zipped(("a" * 300, b"1")), "cannot unpack"),
        (zipped(("a", b"1"), method=14), "another method than deflate"),
        (encrypted(), "encrypted"),
        (zipped(*((f"{k}", b"") for k in range(101))), "101 files of 0 bytes; at most 100"),
        (zipped(("a", b"\0" * 1_000_001)), "1 files of 1000001 bytes; at most"),
        (lying(100), "not an archive of runs"),
        (lying(1_000_000 - 1), "not an archive of runs"),
        (zipped(("seed0/config.json", b"[]")), "x.zip/seed0/config.json: must hold a JSON object"),
        (zipped(("a/b", b"")), "x.zip: no run in it"),
    ],
    # Archives hold the time, and processes that run the tests must give them the same names.
    ids=lambda value: value if isinstance(value, str) else "archive",
)
def test_bad_archives_end_with_one_line_and_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    why: str,
) -> None:
    monkeypatch.setattr(archives, "MOST_FILES", 100)
    monkeypatch.setattr(archives, "MOST_BYTES", 1_000_000)
    (tmp_path / "x.zip").write_bytes(data)
    before = sorted(tmp_path.parent.rglob("*"))
    assert main(["report", str(tmp_path / "x.zip"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"acktr: error: {tmp_path / 'x.zip'}") and error.count("\n") == 1
    assert why in error
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_names_that_stand_twice_and_links(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        (tmp_path / "x.zip").write_bytes(zipped(("a", b"1"), ("a", b"2")))
    with pytest.raises(ValueError, match="is in it twice"):
        read_archive(tmp_path / "x.zip")
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    (tmp_path / "y.zip").write_bytes(zipped((link, b"/etc/passwd")))
    with unpacked([tmp_path / "y.zip"]) as (folder,):  # a file with that text
        assert (folder / "link").read_bytes() == b"/etc/passwd"
        assert not (folder / "link").is_symlink()


def test_damaged_archives_are_refused_or_read(tmp_path: Path) -> None:
    """Whatever bytes are wrong, there is a line or the files are whole."""
    files = {f"Hopper-v5/acktr/seed{k}/eval.csv": b"timesteps,x\n1,2\n" * k for k in range(4)}
    data, path = pack(files), tmp_path / "x.zip"
    generator = random.Random(0)
    for _ in range(500):
        spoilt = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 8))):
            spoilt[generator.randrange(len(spoilt))] = generator.randrange(256)
        path.write_bytes(spoilt[: generator.choice((len(spoilt), generator.randrange(900)))])
        try:
            contents = read_archive(path).values()
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert set(contents) <= set(files.values())
