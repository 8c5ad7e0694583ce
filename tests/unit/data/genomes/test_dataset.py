# SPDX-License-Identifier: Apache-2.0
"""Windows and the stream of them: boundaries, strands, shards, resuming, memory."""

import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from deepspeed_ds4sci.data.genomes import CODONS, IGNORE, GenomeDataConfig, GenomeDataset, nucleotides
from deepspeed_ds4sci.data.genomes.documents import cut_windows, token_pieces
from deepspeed_ds4sci.data.genomes.tokenizer import CLS, PAD, SEP


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files: a record of 100 codons and one of 3, and one of 41 codons."""
    folder = tmp_path_factory.mktemp("genomes")
    rng = np.random.default_rng(0)

    def text(n):
        return nucleotides.decode(rng.integers(0, 4, n).astype(np.uint8))

    (folder / "a.fa").write_text(f">a1\n{text(302)}\n>a2\n{text(9)}\n")
    (folder / "b.fa").write_text(f">b1\n{text(123)}\n")
    return folder / "a.fa", folder / "b.fa"


def config(**changes):
    return GenomeDataConfig(**{"context": 16, **changes})


def items(dataset):
    return [item["input_ids"].tolist() for item in dataset]


@pytest.mark.parametrize("context", [2, 7, 16, 300])
def test_windows_are_the_documents_cut(files, context):
    pieces = list(token_pieces(files[0], CODONS, "genome"))
    whole = np.concatenate([piece.tokens for piece in pieces])
    assert (len(whole), whole[0], whole[101], whole[102], whole[-1]) == (102 + 5, CLS, SEP, CLS, SEP)
    windows = list(cut_windows(iter(pieces), context, packed=True))
    flat = np.concatenate([window.tokens for window in windows])
    assert np.array_equal(flat[: len(whole)], whole) and (flat[len(whole) :] == PAD).all()
    documents = np.concatenate([window.documents for window in windows])
    assert (documents[len(whole) :] == -1).all() and (documents[: len(whole)] >= 0).all()
    for window in windows:
        assert window.documents[0] == 0
        assert ((np.diff(window.documents) == 1) == (window.tokens[1:] == CLS)).all()
    apart = list(cut_windows(iter(pieces), context, packed=False))
    assert len(apart) == -(-102 // context) + -(-5 // context)
    assert all(set(window.documents.tolist()) <= {0, -1} for window in apart)


def test_another_loop_is_another_pass(files):
    dataset = GenomeDataset(files, config(), epochs=1)
    passes = [items(dataset) for _ in range(3)]
    assert passes[0] and passes[0] == passes[1] == passes[2]
    state = dataset.state_dict()
    resumed = GenomeDataset(files, config(), epochs=1)
    resumed.load_state_dict(state)
    assert items(resumed) == []  # it was taken at the end
    assert items(resumed) == passes[0]


def test_items_say_where_documents_start(files):
    last = list(GenomeDataset(files[:1], config(), epochs=1))[-1]
    assert last["input_ids"].dtype == torch.int64
    # 107 tokens in windows of 16: the last has 6 of the first record, 5 of the second, 5 of padding.
    assert last["document_ids"].tolist() == [0] * 6 + [1] * 5 + [-1] * 5
    assert last["position_ids"].tolist() == [*range(6), *range(5), *range(5)]
    expected = last["input_ids"].clone()
    expected[[0, 6]] = IGNORE
    expected[11:] = IGNORE
    assert torch.equal(last["labels"], expected)


def test_each_window_comes_with_its_other_strand(files):
    forward = list(GenomeDataset(files, config(), epochs=1).windows_of(0))
    both = list(GenomeDataset(files, config(reverse_strand=True), epochs=1).windows_of(0))
    assert len(both) == 2 * len(forward)
    for window, other, there in zip(both[::2], both[1::2], forward, strict=True):
        assert np.array_equal(window.tokens, there.tokens) and np.array_equal(window.documents, other.documents)
        assert np.array_equal(other.reverse_complement(CODONS).tokens, window.tokens)
        first = window.documents == 0
        assert np.array_equal(other.tokens[first], CODONS.reverse_complement(window.tokens[first]))


@pytest.mark.parametrize("reverse", [False, True])
def test_held_out_windows_are_those_that_training_lacks(files, reverse):
    def part(name):
        options = dict(held_out_every=3, part=name, reverse_strand=reverse)
        return items(GenomeDataset(files, config(**options), epochs=1))

    train, held_out = part("train"), part("held_out")
    assert sorted(train + held_out) == sorted(part("all"))
    assert len(held_out) == (2 + 0 + 1) * (1 + reverse)


@pytest.mark.parametrize("shuffle", [0, 4])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_out_the_windows_of_one_rank(files, shuffle, size):
    settings = config(shuffle=shuffle, reverse_strand=True)
    alone = items(islice(iter(GenomeDataset(files, settings)), 60))
    ranks = [items(islice(iter(GenomeDataset(files, settings, rank=r, size=size)), 60 // size)) for r in range(size)]
    assert [each for turn in zip(*ranks, strict=True) for each in turn] == alone
    if shuffle:
        assert alone[:20] != alone[20:40] and sorted(alone[:20]) == sorted(alone[20:40])  # 20 windows per epoch


def test_the_last_epoch_ends_for_all_ranks_together(files):
    alone = items(GenomeDataset(files, config(), epochs=1))  # 10 windows
    ranks = [list(GenomeDataset(files, config(), rank=r, size=4, epochs=1)) for r in range(4)]
    assert [len(rank) for rank in ranks] == [3, 3, 3, 3]
    counted = [item for rank in ranks for item in rank if (item["labels"] != IGNORE).any()]
    assert sorted(item["input_ids"].tolist() for item in counted) == sorted(alone)
    many = [list(GenomeDataset(files, config(), rank=r, size=16, epochs=1)) for r in range(16)]
    assert [len(rank) for rank in many] == [1] * 16


@pytest.mark.parametrize("shuffle", [0, 4])
@pytest.mark.parametrize("size, then", [(1, 1), (2, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("taken", [0, 1, 5, 9, 14])
def test_a_stream_goes_on_from_its_state_on_any_number_of_ranks(files, shuffle, size, then, taken):
    settings = config(shuffle=shuffle, seed=3)
    alone = items(islice(iter(GenomeDataset(files, settings)), taken * size + 24))
    states = []
    for rank in range(size):
        dataset = GenomeDataset(files, settings, rank=rank, size=size)
        list(islice(iter(dataset), taken))
        states.append(json.loads(json.dumps(dataset.state_dict())))
    for state in states:  # any rank's will do
        resumed = []
        for rank in range(then):
            dataset = GenomeDataset(files, settings, rank=rank, size=then)
            dataset.load_state_dict(state)
            resumed.append(items(islice(iter(dataset), 24 // then)))
        assert [each for turn in zip(*resumed, strict=True) for each in turn] == alone[taken * size :]


def test_a_state_is_of_the_data_that_it_was_taken_from(files):
    state = GenomeDataset(files, config()).state_dict()
    with pytest.raises(ValueError, match=r"the state is of other data: it has context = 16, got 32"):
        GenomeDataset(files, config(context=32)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"files = \[\['a.fa', \d+\], \['b.fa', \d+\]\], got \[\['b.fa'"):
        GenomeDataset(files[1:], config()).load_state_dict(state)


def test_a_loader_batches_and_its_workers_are_refused(files):
    from torch.utils.data import DataLoader

    batches = list(DataLoader(GenomeDataset(files, config(), epochs=1), batch_size=4))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    with pytest.raises(NotImplementedError, match="use num_workers = 0"):
        list(DataLoader(GenomeDataset(files, config(), epochs=1), num_workers=1))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(context=1), "context must be at least 2, got 1"),
        (dict(shuffle=-1), "shuffle must be at least 0, got -1"),
        (dict(tokens="protein"), "tokens must be one of codon, nucleotide, got 'protein'"),
        (dict(sequences="all"), "sequences must be one of genome, annotated, called, genes, got 'all'"),
        (dict(part="test"), "part must be one of all, train, held_out, got 'test'"),
        (dict(part="train"), "part = 'train' needs held_out_every of at least 2, got 0"),
        (dict(reverse_strand=True, sequences="called"), "reverse_strand needs sequences = \"genome\", got 'called'"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_wrong_arguments_are_named(files):
    for options, message in (
        (dict(paths=[]), "paths must name at least one file"),
        (dict(rank=2, size=2), r"rank must be in \[0, size = 2\), got 2"),
        (dict(epochs=0), "epochs must be at least 1 or None, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GenomeDataset(**{"paths": files, "config": config(), **options})
    with pytest.raises(ValueError, match="no window of part 'held_out' in "):
        next(iter(GenomeDataset(files[1:], config(held_out_every=100, part="held_out"))))


_MEASURE = """
import resource, sys, time
from deepspeed_ds4sci.data.genomes import GenomeDataConfig, GenomeDataset
dataset = GenomeDataset([sys.argv[1]], GenomeDataConfig(context=2048, shuffle=256), epochs=1)
list(GenomeDataset([sys.argv[2]], dataset.config, epochs=1))  # imports and first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
tokens = sum(int((item["document_ids"] >= 0).sum()) for item in dataset)
seconds = time.perf_counter() - start
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, tokens / seconds, tokens)
"""


def test_50_megabases_take_little_memory_and_time(tmp_path, files):
    million = nucleotides.decode(np.random.default_rng(0).integers(0, 4, 10**6).astype(np.uint8))
    path = tmp_path / "big.fa"
    with path.open("w") as file:  # a line of a million, then lines of 100
        file.write(">big\n" + million + "\n")
        wrapped = "\n".join(million[i : i + 100] for i in range(0, 10**6, 100)) + "\n"
        file.writelines(wrapped for _ in range(49))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), str(files[0])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    mebibytes, tokens_per_second, tokens = map(float, done.stdout.splitlines()[-1].split())
    assert tokens == 50 * 10**6 // 3 + 2
    assert mebibytes < 100
    # Far below what is measured on an idle core, and above what one GPU trains on.
    assert tokens_per_second > 500_000
