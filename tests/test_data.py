import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

import quiesce.data
from quiesce.data import Samples, check_like, gather, load_data
from quiesce.errors import DataError
from quiesce.preprocess import Preprocessing

RGB = Preprocessing(resize=8, crop=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
GREY = Preprocessing(resize=None, crop=(8, 8), mean=(0.0,), std=(1.0,), channels=1)


def write_image(path: Path, value: int = 100, size: tuple[int, int] = (10, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """Write images whose grey value tells class and number apart."""
    for row, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(folder / name / f"{i}.png", 100 * row + i)
    return folder


def grey_values(samples: Samples) -> list[int]:
    (images,) = samples.args
    return ((images[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().int().tolist()


class Faulty(Dataset[torch.Tensor]):
    """Six vectors; reading the fourth kills the process (as the system does when memory is short), or finds no file."""

    def __init__(self, fault: str, file: Path) -> None:
        self.fault, self.file = fault, file

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3 and self.fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3:
            self.file.read_bytes()
        return torch.full((3,), float(index))


class TestSamples:
    def test_select_and_batches_keep_everything_together(self) -> None:
        samples = Samples((torch.arange(5.0),), {"b": torch.arange(10).view(5, 2)}, torch.arange(5))
        batches = list(samples.batches(2))
        assert [len(b) for b in batches] == [2, 2, 1]
        assert batches[2].args[0].item() == 4
        assert batches[2].kwargs["b"].tolist() == [[8, 9]]
        picked = samples.select(torch.tensor([3, 0]))
        assert picked.labels is not None and picked.labels.tolist() == [3, 0]
        assert picked.kwargs["b"].tolist() == [[6, 7], [0, 1]]

    def test_to_moves_every_tensor(self) -> None:
        samples = Samples((torch.ones(1),), {"b": torch.ones(1)}, torch.ones(1, dtype=torch.int64))
        moved = samples.to(torch.device("meta"))
        assert moved.labels is not None
        assert {t.device.type for t in (*moved.args, *moved.kwargs.values(), moved.labels)} == {"meta"}

    @pytest.mark.parametrize("args", [(), (torch.tensor(1.0),), (torch.ones(2), torch.ones(3))])
    def test_needs_one_common_batch_size(self, args: tuple[torch.Tensor, ...]) -> None:
        with pytest.raises(DataError, match="one common first dimension"):
            Samples(args)


class TestGather:
    def test_tensor_and_samples_are_taken_as_they_are(self) -> None:
        x = torch.randn(5, 3)
        samples = gather(x)
        assert samples.args[0] is not None and samples.labels is None
        assert torch.equal(samples.args[0], x)
        assert gather(samples, limit=2).args[0].shape == (2, 3)

    def test_data_loader_with_labels_and_a_short_last_batch(self) -> None:
        x, y = torch.randn(7, 3), torch.arange(7)
        samples = gather(DataLoader(TensorDataset(x, y), batch_size=3))
        assert torch.equal(samples.args[0], x)
        assert samples.labels is not None and torch.equal(samples.labels, y)

    @pytest.mark.parametrize(
        "second", [torch.randn(2), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([True, False]), "name", None]
    )
    def test_a_second_element_that_is_no_label_is_ignored(self, second: object) -> None:
        assert gather([(torch.ones(2, 3), second, "more")]).labels is None

    def test_dicts_are_keyword_arguments(self) -> None:
        batches = [{"a": torch.ones(2, 3), "mask": torch.ones(2, dtype=torch.bool), "labels": torch.tensor([1, 2])}] * 2
        samples = gather(batches)
        assert samples.args == () and set(samples.kwargs) == {"a", "mask"}
        assert samples.labels is not None and samples.labels.tolist() == [1, 2, 1, 2]
        assert len(gather(batches[0])) == 2

    def test_limit_reads_no_more_batches_than_needed(self) -> None:
        def endless():  # type: ignore[no-untyped-def]
            while True:
                yield torch.ones(4, 3)

        assert len(gather(endless(), limit=10)) == 10

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("dies", r"evaluation data raised RuntimeError: DataLoader worker \(pid.*\) (is killed|exited)"),
            ("vanishes", r"evaluation data raised FileNotFoundError: .*No such file or directory: '.*gone\.png'$"),
        ],
    )
    def test_a_worker_that_dies_and_one_whose_file_vanishes(self, tmp_path: Path, fault: str, message: str) -> None:
        loader = DataLoader(Faulty(fault, tmp_path / "gone.png"), batch_size=2, num_workers=1)
        with pytest.raises(DataError, match=message):
            gather(loader, "evaluation")

    def test_gradients_are_left_behind(self) -> None:
        assert not gather(torch.ones(2, 3, requires_grad=True)).args[0].requires_grad

    @pytest.mark.parametrize("data", [[], iter([]), torch.ones(0, 3), [torch.ones(0, 3)]])
    def test_empty(self, data: object) -> None:
        with pytest.raises(DataError, match="evaluation data is empty"):
            gather(data, "evaluation")

    @pytest.mark.parametrize(("data", "kind"), [(3, "an int"), ("images", "a str"), (None, "a NoneType")])
    def test_not_iterable(self, data: object, kind: str) -> None:
        with pytest.raises(DataError, match=f"is {kind}; give a tensor"):
            gather(data)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_infinity_name_the_batch(self, bad: float) -> None:
        batches = [torch.ones(2, 3), torch.ones(2, 3)]
        batches[1][1, 2] = bad
        with pytest.raises(DataError, match="calibration batch 1, input 0, holds NaN or infinite"):
            gather(batches)
        with pytest.raises(DataError, match="input 'x', holds NaN"):
            gather({"x": batches[1]})

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (torch.ones(2, 4), r"batch 1, input 0, is float32 \[N, 4\] .* first batch has float32 \[N, 3\]"),
            (torch.ones(2, 3).double(), r"batch 1, input 0, is float64"),
            ({"x": torch.ones(2, 3)}, "batch 1 holds input 'x', but the first batch holds input 0"),
            ((torch.ones(2, 3), torch.tensor([0, 1])), "batch 1 holds input 0, labels, but the first"),
            ((torch.ones(2, 3), torch.tensor([0, 1, 2])), r"batch 1: .* labels \[3\]"),
            ((), "batch 1 is an empty tuple"),
            (np.ones((2, 3)), "batch 1 is a ndarray, not a tensor"),
            ({"label": torch.tensor([1, 2])}, "batch 1 has no inputs"),
            ({"x": torch.ones(2), "label": torch.ones(2)}, "labels once, as an integer tensor"),
            (torch.tensor(1.0), "batch 1: .* first dimension"),
        ],
    )
    def test_unlike_batches(self, second: object, message: str) -> None:
        with pytest.raises(DataError, match=message):
            gather([torch.ones(2, 3), second])

    def test_limit_below_one(self) -> None:
        with pytest.raises(DataError, match="limit of calibration samples is 0"):
            gather(torch.ones(2), limit=0)


class TestCheckLike:
    def test_accepts_another_batch_size(self) -> None:
        check_like(Samples((torch.ones(5, 3),)), Samples((torch.ones(2, 3),)), "calibration")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (Samples((torch.ones(2, 4),)), r"input 0 of the test data is float32 \[N, 4\], .* float32 \[N, 3\]"),
            (Samples((torch.ones(2, 3).half(),)), r"float16 \[N, 3\]"),
            (Samples((torch.ones(2, 3), torch.ones(2, 3))), "has input 0, input 1, but"),
            (Samples((), {"x": torch.ones(2, 3)}), "has input 'x', but .* captured with input 0"),
        ],
    )
    def test_names_what_does_not_fit(self, given: Samples, message: str) -> None:
        with pytest.raises(DataError, match=message):
            check_like(given, Samples((torch.ones(2, 3),)), "test")


class TestFolder:
    def test_sub_folders_are_sorted_classes_as_in_torchvision(self, tmp_path: Path) -> None:
        from torchvision.datasets import ImageFolder

        write_classes(tmp_path, {"b": 2, "10": 3, "2": 1})
        write_image(tmp_path / "b" / "deep" / "er" / "x.JPG", 77)
        samples = load_data(str(tmp_path), RGB)
        reference = {np.asarray(image)[0, 0, 0].item(): label for image, label in ImageFolder(str(tmp_path))}
        assert samples.labels is not None and len(samples) == len(reference) == 7
        assert dict(zip(grey_values(samples), samples.labels.tolist(), strict=True)) == reference
        assert samples.args[0].shape == (7, 3, 8, 8)

    def test_a_flat_folder_has_no_labels(self, tmp_path: Path) -> None:
        for i in range(3):
            write_image(tmp_path / f"{i}.png", i)
        write_image(tmp_path / "more" / "4.png", 4)
        (tmp_path / "notes.txt").write_text("not an image")
        samples = load_data(str(tmp_path), RGB)
        assert samples.labels is None
        assert sorted(grey_values(samples)) == [0, 1, 2, 4]

    def test_a_limit_takes_all_classes_evenly_and_by_seed(self, tmp_path: Path) -> None:
        write_classes(tmp_path, {"a": 20, "b": 3, "c": 20})
        chosen = [load_data(str(tmp_path), RGB, limit=9, seed=s) for s in (0, 0, 1)]
        for samples in chosen:
            assert samples.labels is not None
            assert torch.bincount(samples.labels).tolist() == [3, 3, 3]
        assert grey_values(chosen[0]) == grey_values(chosen[1]) != grey_values(chosen[2])
        everything = load_data(str(tmp_path), RGB)
        assert grey_values(everything)[:9] == grey_values(chosen[0])
        assert sorted(grey_values(everything)) == sorted([*range(20), *range(100, 103), *range(200, 220)])

    def test_linked_class_folders_are_followed(self, tmp_path: Path) -> None:
        write_classes(tmp_path / "store", {"cat": 2})
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "cat", target_is_directory=True)
        assert len(load_data(str(tmp_path / "data"), RGB)) == 2

    def test_without_preprocessing(self, tmp_path: Path) -> None:
        write_image(tmp_path / "1.png")
        with pytest.raises(DataError, match="give --resize, --crop, --mean, --std and --interpolation"):
            load_data(str(tmp_path), None)

    def test_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no images"):
            load_data(str(tmp_path), RGB)

    def test_an_empty_class(self, tmp_path: Path) -> None:
        write_classes(tmp_path, {"a": 1, "c": 1})
        (tmp_path / "b").mkdir()
        with pytest.raises(DataError, match=r"sub-folder 'b' of .* holds no images"):
            load_data(str(tmp_path), RGB)

    @pytest.mark.parametrize("damage", [b"no image", b""])
    def test_a_corrupt_image_is_named(self, tmp_path: Path, damage: bytes) -> None:
        write_image(tmp_path / "good.png")
        (tmp_path / "bad.jpg").write_bytes(damage)
        with pytest.raises(DataError, match=r"image .*bad\.jpg can't be read"):
            load_data(str(tmp_path), RGB)

    def test_a_truncated_image_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(DataError, match=r"cut\.png can't be read"):
            load_data(str(tmp_path), RGB)


class TestNpz:
    def test_float_inputs_as_they_are(self, tmp_path: Path) -> None:
        x, y = np.random.default_rng(0).normal(size=(6, 3, 4, 4)).astype(np.float32), np.arange(6, dtype=np.uint8)
        np.savez(tmp_path / "d.npz", x=x, y=y)
        samples = load_data(str(tmp_path / "d.npz"), None)
        assert samples.labels is not None and sorted(samples.labels.tolist()) == list(range(6))
        assert torch.equal(samples.args[0], torch.from_numpy(x)[samples.labels])
        assert len(load_data(str(tmp_path / "d.npz"), None, limit=4)) == 4

    def test_uint8_images_are_scaled_and_normalized(self, tmp_path: Path) -> None:
        images = np.full((2, 5, 6, 3), 255, dtype=np.uint8)
        np.savez(tmp_path / "d.npz", images=images, labels=np.array([0, 1]))
        (x,) = load_data(str(tmp_path / "d.npz"), RGB).args
        assert x.shape == (2, 3, 5, 6) and torch.all(x == 2)
        with pytest.raises(DataError, match="how to scale the uint8 images"):
            load_data(str(tmp_path / "d.npz"), None)

    def test_grey_images(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", images=np.full((2, 5, 6), 51, dtype=np.uint8))
        (x,) = load_data(str(tmp_path / "d.npz"), GREY).args
        assert x.shape == (2, 1, 5, 6) and torch.allclose(x, torch.tensor(0.2))
        with pytest.raises(DataError, match=r"have shape \[2, 5, 6\]; give \[N, height, width, 3\]"):
            load_data(str(tmp_path / "d.npz"), RGB)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"y": np.zeros(2)}, "name the array of inputs x or images"),
            ({"x": np.zeros((0, 3), np.float32)}, "inputs of .* are empty"),
            ({"x": np.array(["a", "b"])}, "save float32"),
            ({"x": np.zeros(2, np.float32), "y": np.zeros(3, np.int64)}, r"labels .* int64 \[3\]; give integers \[2\]"),
            ({"x": np.zeros(2, np.float32), "y": np.zeros(2)}, "labels .* float64"),
            ({"x": np.array([1.0, np.nan], np.float32)}, "holds NaN"),
            ({"x": np.array([{}, {}], dtype=object)}, "can't be read as .npz"),
        ],
    )
    def test_bad_arrays(self, tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(DataError, match=message):
            load_data(str(tmp_path / "d.npz"), RGB)

    def test_bad_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is not there"):
            load_data(str(tmp_path / "none.npz"), RGB)
        path = tmp_path / "cut.npz"
        np.savez(path, x=np.zeros((100, 100), np.float32))
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(DataError, match=r"can't be read as .npz"):
            load_data(str(path), RGB)


def test_an_image_that_vanishes_behind_the_listing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    listing = quiesce.data._image_files

    def vanishing(folder: Path) -> list[Path]:
        files = listing(folder)
        (tmp_path / "b.png").unlink()
        return files

    monkeypatch.setattr(quiesce.data, "_image_files", vanishing)
    with pytest.raises(DataError, match=r"image .*b\.png can't be read \(.*No such file.*; repair or remove it"):
        load_data(str(tmp_path), RGB)


class TestCallable:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_data.py").write_text(
            "import torch\n"
            "def good():\n    for _ in range(3):\n        import own_late\n        yield torch.ones(2, 3)\n"
            "def broken():\n    raise KeyError('lost')\n"
            "def breaks_later():\n    yield torch.ones(2, 3)\n    1 / 0\n"
            "def nothing():\n    return []\n"
            "def drawn(limit, *, seed):\n    return torch.full((limit + 1, 1), float(seed))\n"
            "def seeded(seed, size=4):\n    return torch.full((size, 1), 1 / seed)\n"
            "def rest(**rest):\n    return torch.zeros(1, 1 + len(rest))\n"
        )
        (tmp_path / "own_late.py").write_text("")
        monkeypatch.chdir(tmp_path)
        for name in ("own_data", "own_late"):
            monkeypatch.delitem(__import__("sys").modules, name, raising=False)

    def test_its_batches_are_gathered(self) -> None:
        assert len(load_data("own_data:good", None)) == 6
        assert len(load_data("own_data:good", None, limit=3)) == 3

    def test_it_is_given_limit_and_seed_where_it_has_parameters_for_them(self) -> None:
        drawn = load_data("own_data:drawn", None, limit=5, seed=7)
        assert drawn.args[0].tolist() == [[7.0]] * 5
        assert load_data("own_data:seeded", None, limit=3, seed=2).args[0].tolist() == [[0.5]] * 3
        assert load_data("own_data:rest", None, seed=2).args[0].shape == (1, 1)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("own_data:seeded", "calling 'own_data:seeded' with seed=0 raised ZeroDivisionError"),
            ("own_data:broken", "calling 'own_data:broken' without arguments raised KeyError"),
            ("own_data:breaks_later", "iterating over the evaluation data raised ZeroDivisionError"),
            ("own_data:nothing", "evaluation data is empty"),
            ("own_data:goood", "has no 'goood'. Did you mean 'good'"),
            ("own_dta:good", "module 'own_dta' .* can't be imported"),
        ],
    )
    def test_errors(self, spec: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_data(spec, None, what="evaluation")


def test_unknown_spec(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"calibration data '.*missing' is not there; give an image folder"):
        load_data(str(tmp_path / "missing"), RGB)
    with pytest.raises(DataError, match="limit of calibration samples is 0"):
        load_data(str(tmp_path), RGB, limit=0)
