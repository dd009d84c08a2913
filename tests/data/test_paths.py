"""`package:` paths lead to files of installed packages, and say how to install what is missing."""

import sys

import pytest

from fastppo.data.paths import locate


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package, some_data 1.2, that cannot be imported."""
    (tmp_path / "some_data" / "texts").mkdir(parents=True)
    (tmp_path / "some_data" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "some_data" / "texts" / "a.csv").write_text("text\n")
    (tmp_path / "some_data-1.2.dist-info").mkdir()
    (tmp_path / "some_data-1.2.dist-info" / "METADATA").write_text("Name: some-data\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "some_data"


def test_a_file_is_found_without_importing_the_package(package):
    assert locate("package:some_data/texts/a.csv") == package / "texts" / "a.csv"
    assert locate("package:some_data") == package
    assert locate("package:some_data==1.2/texts/a.csv") == package / "texts" / "a.csv"
    assert "some_data" not in sys.modules


@pytest.mark.parametrize("path", ["some/directory", "owner/model", "gpt2", "/x/y.csv"])
def test_other_paths_and_hub_names_come_back_as_they_are(path):
    assert str(locate(path)) == path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("package:no_such_data/a.csv", "pip install --no-deps no-such-data"),
        ("package:no_such_data==3.1", "pip install --no-deps no-such-data==3.1"),
        (
            "package:some_data==1.3/texts/a.csv",
            "version 1.2 of some-data is installed.*pip install --no-deps some-data==1.3",
        ),
        ("package:some_data/texts/b.csv", "has no texts/b.csv"),
        ("package:sys", "not installed"),
        ("package:/a.csv", "not the name of a package"),
        ("package:some.data", "not the name of a package"),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_get_it(package, path, words):
    with pytest.raises(FileNotFoundError, match=words) as error:
        locate(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)
