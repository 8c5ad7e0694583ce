# SPDX-License-Identifier: Apache-2.0
"""Parsers: every format, plain and compressed, and every way a file can be wrong."""

import gzip

import numpy as np
import pytest

from deepspeed_ds4sci.data import read_alignment
from deepspeed_ds4sci.data.alphabet import AMINO_ACIDS, GAP, INVALID, MASK, TOKEN_OF_BYTE, UNKNOWN, decode, encode

STOCKHOLM = """# STOCKHOLM 1.0
#=GF ID   test
#=GS one/1-5 AC P1

one/1-5   ACD.E
two/3-9   A-DWe
#=GC SS_cons ..H..
//
"""
INTERLEAVED = """# STOCKHOLM 1.0

one/1-5   ACD
two/3-9   A-D

one/1-5   .E
two/3-9   We
//

"""
FASTA = ">one/1-5 first\nACD-\nE\n\n>two/3-9\nA-DW\ne\n"
A3M = "#comment\n>one/1-5 first\nACDggg-E\n>two/3-9\nA-D\nW.E\n"


def write(tmp_path, name, text):
    path = tmp_path / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "name, text",
    [("a.sto", STOCKHOLM), ("b.sto", INTERLEAVED), ("c.fasta", FASTA), ("d.a3m", A3M), ("e.txt", "\n" + STOCKHOLM)],
)
def test_each_format_gives_the_same_alignment(tmp_path, name, text, suffix):
    alignment = read_alignment(write(tmp_path, name + suffix, text))
    assert alignment.names == ("one/1-5", "two/3-9")
    assert [decode(row) for row in alignment.tokens] == ["ACD-E", "A-DWE"]
    assert alignment.tokens.dtype == np.uint8
    assert alignment.source.endswith(name + suffix)


def test_gzip_is_recognised_without_the_suffix(tmp_path):
    path = write(tmp_path, "a.sto", gzip.compress(STOCKHOLM.encode()))
    assert len(read_alignment(path).names) == 2


def test_windows_line_ends_are_accepted(tmp_path):
    assert len(read_alignment(write(tmp_path, "a.sto", STOCKHOLM.replace("\n", "\r\n"))).names) == 2


def test_the_format_can_be_given(tmp_path):
    path = write(tmp_path, "a.txt", A3M)
    assert [decode(row) for row in read_alignment(path, format="a3m").tokens] == ["ACD-E", "A-DWE"]
    with pytest.raises(ValueError, match="format must be one of stockholm, a3m, fasta or None, got 'clustal'"):
        read_alignment(path, format="clustal")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.sto", "", ":1: the file is empty"),
        ("a.fasta", "\n\n", ":1: the file is empty"),
        ("a.sto", "# STOCKHOLM 1.0\n//\n", ":1: no sequences in the file"),
        ("a.sto", "# STOCKHOLM 1.0\none AC\n", ":2: the file ends without '//'; is it complete"),
        ("a.sto", "# STOCKHOLM 1.0\none AC D\n//\n", ":2: expected a name and an aligned row, got 3 fields"),
        (
            "a.sto",
            "# STOCKHOLM 1.0\none AC\ntwo AC\none AC\n//\n",
            ":4: the name 'one' is there twice, first on line 2",
        ),
        ("a.sto", "# STOCKHOLM 1.0\none AC\ntwo ACD\n//\n", ":3: 'two' has 3 columns, expected 2 as 'one' has"),
        ("a.sto", STOCKHOLM + STOCKHOLM, ":9: expected one alignment, got a second one; split the file"),
        (
            "a.sto",
            "# STOCKHOLM 1.0\none A4\n//\n",
            ":2: 'one' has '4' at column 2, expected a residue letter or a gap",
        ),
        ("a.fasta", "one\nAC\n", ":1: expected '>name', got 'one'"),
        ("a.fasta", ">one\nAC\n>\nAC\n", ":3: expected a name after '>', got none"),
        ("a.fasta", ">one\nAC\n>two\n", ":3: 'two' has no sequence"),
        ("a.fasta", ">one\nAC\n>two\nACD\nE\n", ":3: 'two' has 4 columns, expected 2 as 'one' has"),
        ("a.fasta", ">one\nA*C\n", ":1: 'one' has '\\*' at column 2"),
        ("a.fasta", ">one\nAC**\n", ":1: 'one' has '\\*' at column 3"),
        ("a.fasta", ">one\nA\0C\n", ":1: 'one' has '\\\\x00' at column 2"),
        ("a.a3m", ">ss_pred\nHH\n", ":1: no sequences in the file"),
        ("a.fasta", ">one\nAé\n", ":1: 'one' has 'é' at column 2"),
        ("a.fasta", b">one\nA\xff\n", ":2: not text in UTF-8"),
        ("a.a3m", "#only\n\n#comments\n", ":3: no sequences after the comments"),
        ("a.a3m", ">one\nACd\n>two\nAC\n>three\nA\n", ":5: 'three' has 1 columns, expected 2 as 'one' has"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=f"{name}{message}"):
        read_alignment(path)


@pytest.mark.parametrize(
    "name, text, names, rows",
    [
        ("hits.a3m", ">q\nACD\n>U1 n=1\nA-D\n>U1 n=1\n--D\n>U1\nAC-\n", "q U1 U1#2 U1#3", "ACD A-D --D AC-"),
        ("taken.fasta", ">a#2\nAC\n>a\nAD\n>a\nAE\n>a#2\nAF\n", "a#2 a a#3 a#2#2", "AC AD AE AF"),
        ("complex.a3m", "#2,1\t1,1\n>101\t102\nACD\n>101\nAC-\n\n>101\nAC-\n", "101 101#2 101#3", "ACD AC- AC-"),
        ("joined.a3m", ">101\nACD\n\0>102\nAC-\n\0", "101 102", "ACD AC-"),
        ("hhblits.a3m", ">ss_pred PSIPRED\nCHH\n>ss_conf PSIPRED\n987\n>q\nACD\n>sa_1\nAC-\n", "q sa_1", "ACD AC-"),
        ("dssp.a3m", ">ss_dssp\nCHH\n>ss_dssp\nCHH\n>sa_pred\nCHH\n>q\nACD\n", "q", "ACD"),
        ("no_hh_suite.fasta", ">ss_pred\nACD\n", "ss_pred", "ACD"),
        ("ends.fasta", ">a\nAC\nD*\n>b\nA-D*\n", "a b", "ACD A-D"),
    ],
)
def test_what_programs_write_is_read(tmp_path, name, text, names, rows):
    alignment = read_alignment(write(tmp_path, name, text))
    assert alignment.names == tuple(names.split())
    assert [decode(row) for row in alignment.tokens] == rows.split()


def test_given_stockholm_needs_its_header(tmp_path):
    with pytest.raises(ValueError, match=":1: expected '# STOCKHOLM 1.0', got '>one/1-5 first'"):
        read_alignment(write(tmp_path, "a.txt", FASTA), format="stockholm")


@pytest.mark.parametrize("cut", [30, 60])
def test_a_cut_gzip_file_is_named(tmp_path, cut):
    whole = gzip.compress(STOCKHOLM.encode())
    path = tmp_path / "a.sto.gz"
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"a.sto.gz:\d+: damaged gzip data"):
        read_alignment(path)


def test_a_missing_file_stays_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_alignment(tmp_path / "none.sto")


def test_tokens_cover_the_alphabet():
    assert decode(encode(AMINO_ACIDS)) == decode(encode(AMINO_ACIDS.lower())) == AMINO_ACIDS
    assert (encode("XBJOUZxbjouz") == UNKNOWN).all()
    assert (encode("-._~") == GAP).all()
    assert (TOKEN_OF_BYTE == INVALID).sum() == 256 - 2 * 26 - 4
    assert decode(np.array([MASK, GAP, UNKNOWN])) == "#-X"


def test_gappy_columns_are_dropped(tmp_path):
    alignment = read_alignment(write(tmp_path, "a.fasta", ">a\nA-C-\n>b\nAD--\n>c\nA-C-\n"))
    assert [decode(row) for row in alignment.drop_gappy_columns(0.5).tokens] == ["AC", "A-", "AC"]
    assert [decode(row) for row in alignment.drop_gappy_columns(0.0).tokens] == ["A", "A", "A"]
    assert alignment.drop_gappy_columns(1.0).tokens.shape == (3, 4)
    with pytest.raises(ValueError, match=r"max_gap_fraction must be in \[0, 1\], got 50"):
        alignment.drop_gappy_columns(50)


def test_no_column_left_is_an_error(tmp_path):
    alignment = read_alignment(write(tmp_path, "a.fasta", ">a\nA-\n>b\n-D\n"))
    with pytest.raises(ValueError, match=r"a.fasta: max_gap_fraction = 0.2 leaves none of 2 columns"):
        alignment.drop_gappy_columns(0.2)
