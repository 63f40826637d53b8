"""Every way in which tests/mutations.py breaks a kernel is noticed; nothing else is."""

import pathlib
import shutil

import pytest

from tests import mutate, mutations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return mutate.build_engine(tmp_path_factory.mktemp("engine"), jobs=2)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang")
def test_clang_builds_it(tmp_path):
    engine = mutate.build_engine(tmp_path, 2, compiler="clang++")
    program = mutate.build_program("matmul", engine, tmp_path, compiler="clang++")
    assert mutate.run(program, 4) == (4, "")


@pytest.mark.parametrize("name", mutate.PROGRAMS)
def test_unbroken_kernels_are_not_reported(name, engine, tmp_path):
    program = mutate.build_program(name, engine, tmp_path)
    schedules, report = mutate.run(program, mutate.CLEAN_SCHEDULES)
    assert (schedules, report) == (mutate.CLEAN_SCHEDULES, "")


@pytest.mark.parametrize(
    "mutation",
    mutations.MUTATIONS,
    ids=lambda m: f"{pathlib.Path(m.file).stem}: {m.what}",
)
def test_mutation_is_caught(mutation, engine):
    outcome = mutate.try_mutation(mutation, engine)
    assert outcome.caught_by, mutation
