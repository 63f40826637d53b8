"""The training example's parts: data, model, sampling, smoothing of curves."""

import dataclasses

import jax
import numpy as np
import pytest
from gpt_cases import MODEL, TRAIN, shared_trainer, write_source

from gpt import data, plot
from gpt.model import rotate
from gpt.settings import PRESETS
from gpt.training import Trainer, count_parameters, make_optimizer


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


class TestData:
    def test_standard_library_is_enough_and_excludes_what_is_not_it(self):
        folder = data.default_folder()
        names = data.source_files(folder)
        assert {"argparse.py", "json/decoder.py"} <= set(names)
        assert names == sorted(names)
        folders = {part for name in names for part in name.split("/")[:-1]}
        assert not folders & {"site-packages", "test", "idle_test", "__pycache__"}
        assert not [name for name in names if "_sysconfigdata" in name]
        corpus = data.load_corpus()
        assert corpus.num_files == len(names)
        assert corpus.train.size > 10 * corpus.validation.size / 2 > 500_000
        assert 2.5 < data.unigram_entropy(corpus.validation) < 4.0

    def test_streams_hold_every_file_once(self, source_folder):
        corpus = data.load_corpus(source_folder)
        pieces = corpus.train.tobytes().split(b"\0") + (
            corpus.validation.tobytes().split(b"\0")
        )
        files = [path.read_bytes() for path in source_folder.glob("*.py")]
        assert sorted(filter(None, pieces)) == sorted(files)

    def test_adding_a_file_moves_no_other(self, source_folder, tmp_path):
        for path in source_folder.glob("*.py"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "another.py").write_text("added = 1\n")
        before, after = data.load_corpus(source_folder), data.load_corpus(tmp_path)
        added = b"added = 1\n\0"
        assert after.train.tobytes().replace(added, b"") == before.train.tobytes()
        remaining = after.validation.tobytes().replace(added, b"")
        assert remaining == before.validation.tobytes()

    def test_batch_depends_on_seed_and_step_alone(self, source_folder):
        stream = data.load_corpus(source_folder).train
        sizes = {"batch_size": 4, "seqlen": 32}
        batch = data.training_batch(stream, 7, seed=1, **sizes)
        assert batch.shape == (4, 33) and batch.dtype == np.int32
        data.training_batch(stream, 8, seed=1, **sizes)
        again = data.training_batch(stream, 7, seed=1, **sizes)
        np.testing.assert_array_equal(batch, again)
        for step, seed in ((8, 1), (7, 2)):
            other = data.training_batch(stream, step, seed=seed, **sizes)
            assert (batch != other).any()
        assert bytes(batch[0].astype(np.uint8)) in stream.tobytes()

    def test_shortest_stream_gives_the_only_window(self):
        stream = np.arange(5, dtype=np.uint8)
        batch = data.training_batch(stream, 0, seed=0, batch_size=2, seqlen=4)
        np.testing.assert_array_equal(batch, [range(5), range(5)])

    def test_validation_windows_span_the_stream(self):
        stream = np.arange(100, dtype=np.uint8)
        batches = list(
            data.validation_batches(stream, num_windows=5, batch_size=2, seqlen=9)
        )
        assert [batch.shape for batch in batches] == [(2, 10)] * 3
        assert batches[0][0, 0] == 0 and batches[-1][-1, -1] == 99

    def test_unigram_entropy(self):
        uniform = np.repeat(np.arange(4, dtype=np.uint8), 3)
        assert data.unigram_entropy(uniform) == pytest.approx(np.log(4))
        assert data.unigram_entropy(np.zeros(9, np.uint8)) == 0

    def test_folder_without_source(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds 0 usable \*\.py files"):
            data.load_corpus(tmp_path)


class TestModel:
    def test_preset_has_the_parameters_of_gpt2_small(self):
        settings, train = PRESETS["gpt2-124m"]
        train = dataclasses.replace(train, attention="xla")
        shapes = jax.eval_shape(Trainer(settings, train).initial_state)
        rows = 50257 - settings.vocab_size + 1024  # ours has no table of 1024 positions
        without = 124_439_808 - rows * settings.model_dim
        assert count_parameters(shapes.params) == without
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(shapes.params)}
        assert dtypes == {"float32"}

    def test_rotation_depends_on_the_distance_alone(self):
        q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype("float32")
        turned_q, turned_k = (
            rotate(np.broadcast_to(x, (1, 40, 1, 16)))[0, :, 0] for x in (q, k)
        )
        products = np.asarray(turned_q @ turned_k.T)
        np.testing.assert_allclose(products[3, 1], products[33, 31], rtol=1e-4)
        np.testing.assert_allclose(np.diag(products), (q * k).sum(), rtol=1e-4)
        assert abs(products[3, 1] - products[3, 2]) > 1e-3

    def test_a_byte_sees_no_later_byte(self):
        trainer = shared_trainer(MODEL, TRAIN)
        params = trainer.initial_state().params
        tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
        changed = tokens.copy()
        changed[:, 20] = 255
        logits, other = (trainer._model(params)(t) for t in (tokens, changed))
        np.testing.assert_allclose(logits[:, :20], other[:, :20], atol=1e-6)
        assert (abs(logits[:, 20:] - other[:, 20:]).max(-1) > 1e-6).all()

    def test_loss_starts_at_that_of_a_uniform_guess(self, source_folder):
        trainer = shared_trainer(MODEL, TRAIN)
        batch = trainer.batch_at(data.load_corpus(source_folder).train, 0)
        loss = trainer.eval_loss(trainer.initial_state().params, batch)
        assert float(loss) == pytest.approx(np.log(256), abs=0.1)

    def test_weight_decay_spares_norms_biases_and_embeddings(self):
        shapes = jax.eval_shape(shared_trainer(MODEL, TRAIN).initial_state).params
        params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
        zero_gradients = jax.tree.map(np.zeros_like, params)
        optimizer = make_optimizer(TRAIN)
        updates, _ = optimizer.update(zero_gradients, optimizer.init(params), params)
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            name = jax.tree_util.keystr(path)
            assert (np.asarray(update) < 0).all() == ("kernel" in name), name
            assert (np.asarray(update) == 0).all() == ("kernel" not in name), name

    def test_bfloat16_trains_as_float32_does(self, source_folder):
        stream = data.load_corpus(source_folder).train
        curves = []
        for dtype in ("float32", "bfloat16"):
            train = dataclasses.replace(TRAIN, compute_dtype=dtype)
            trainer = shared_trainer(MODEL, train)
            state, curve = trainer.initial_state(), []
            step_function, _ = trainer.compile_step(state, stream)
            for step in range(4):
                state, loss = step_function(state, trainer.batch_at(stream, step))
                curve.append(float(loss))
            curves.append(curve)
            assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
        assert curves[0] != curves[1]
        np.testing.assert_allclose(*curves, rtol=0.02)


class TestSample:
    def test_is_repeatable_and_greedy_at_zero(self):
        trainer = shared_trainer(MODEL, TRAIN)
        params = trainer.initial_state().params

        def draw(**changes):
            chosen = {"temperature": 1.0, "seed": 0} | changes
            return trainer.sample(params, b"import ", 20, **chosen)

        assert draw() == draw() != draw(seed=1)
        assert draw().startswith(b"import ") and len(draw()) == 27
        assert draw(temperature=0.0) == draw(temperature=0.0, seed=1)

    def test_next_byte_is_the_likeliest(self):
        trainer = shared_trainer(MODEL, TRAIN)
        params = trainer.initial_state().params
        text = trainer.sample(params, b"abc", 1, temperature=0.0, seed=0)
        logits = trainer._model(params)(np.frombuffer(b"abc", np.uint8)[None])
        assert text[-1] == int(logits[0, -1].argmax())

    def test_longer_than_the_context(self):
        trainer = shared_trainer(MODEL, TRAIN)
        params = trainer.initial_state().params
        with pytest.raises(ValueError, match="prompt of 3 and length 30 bytes"):
            trainer.sample(params, b"abc", 30, temperature=0.0, seed=0)


def test_smoothing_averages_what_there_is():
    np.testing.assert_allclose(plot.smooth([4.0, 2.0, 6.0], 2), [4, 3, 4])
