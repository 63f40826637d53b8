"""Every way in which tests/mutations.py breaks a kernel is noticed; nothing else is."""

import collections
import fcntl
import os
import pathlib
import pickle
import shutil

import pytest

from tests import mutate, mutations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return mutate.build_engine(tmp_path_factory.mktemp("engine"), jobs=2)
    # One for all worker processes, whose folders are in one of this run.
    folder = tmp_path_factory.getbasetemp().parent / "engine"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            done.write_bytes(pickle.dumps(mutate.build_engine(folder, jobs=2)))
        return pickle.loads(done.read_bytes())


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang")
def test_clang_builds_it(tmp_path):
    engine = mutate.build_engine(tmp_path, 2, compiler="clang++")
    program = mutate.build_program("matmul", engine, tmp_path)
    assert mutate.run(program, 4) == (4, "")


@pytest.mark.parametrize("name", mutate.PROGRAMS)
def test_unbroken_kernels_are_not_reported(name, engine, tmp_path):
    program = mutate.build_program(name, engine, tmp_path, level=mutate.CLEAN_LEVEL)
    schedules, report = mutate.run(program, mutate.CLEAN_SCHEDULES)
    assert (schedules, report) == (mutate.CLEAN_SCHEDULES, "")


def _with_marks():
    """make test tries every fifth one of each file that a program has."""
    params, seen = [], collections.Counter()
    for mutation in mutations.MUTATIONS:
        place = mutation.program, mutation.file
        marks = [pytest.mark.exhaustive] if seen[place] % 5 else []
        seen[place] += 1
        name = f"{pathlib.Path(mutation.file).stem}: {mutation.what}"
        params.append(pytest.param(mutation, marks=marks, id=name))
    return params


def test_enough_are_tried():
    """Of all files and all programs."""
    often = [x.values[0] for x in _with_marks() if not x.marks]
    assert len(often) >= 30
    assert {x.file for x in often} == {x.file for x in mutations.MUTATIONS}
    assert {x.program for x in often} == set(mutate.PROGRAMS)


@pytest.mark.parametrize("mutation", _with_marks())
def test_mutation_is_caught(mutation, engine):
    outcome = mutate.try_mutation(mutation, engine)
    assert outcome.caught_by, mutation


def test_every_mutation_finds_its_place():
    for mutation in mutations.MUTATIONS:
        text = (mutate.ROOT / "cuda" / mutation.file).read_text()
        assert mutation.apply(text) != text, mutation.what
