"""The format of the table, which other programs may read."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

from tests.data.image_files import save
from tests.data.shards.packing import pack

ROOT = Path(__file__).resolve().parents[3]


def test_the_columns_are_those_of_the_documentation(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a.png", caption="one")
    pack(tmp_path / "data", tmp_path / "packed")
    database = sqlite3.connect(tmp_path / "packed" / "shards.sqlite")
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("### The table")[2].partition("\n## ")[0]
    told = [name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert told == [column[1] for column in database.execute("PRAGMA table_info(images)")]
    assert [column[1] for column in database.execute("PRAGMA table_info(shards)")] == ["number", "path", "length"]
    assert sorted(key for (key,) in database.execute("SELECT key FROM facts")) == ["content", "folder_name"]
    # a member is where the table says, by the tar format alone
    ((name, offset, length),) = database.execute("SELECT path, offset, images.length FROM images, shards")
    database.close()
    data = (tmp_path / "packed" / name).read_bytes()
    assert data[offset : offset + length] == (tmp_path / "data" / "a.png").read_bytes()
    assert data[257:262] == b"ustar" and data[: data.index(b"\0")] == b"a.png"
