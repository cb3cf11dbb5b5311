"""Many processes that train together, on torch.distributed: what each takes, what they exchange, how they end."""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastgan.train.checkpoint import TrainingError


class Ranks:
    """The processes of this run, seen from one of them; a run of one process needs no torch.distributed.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        main: whether this is the process that writes the results.
        group: their process group, None for a process alone.
    """

    def __init__(self):
        active = distributed.is_available() and distributed.is_initialized()
        self.rank, self.size = (distributed.get_rank(), distributed.get_world_size()) if active else (0, 1)
        self.main = self.rank == 0
        self.group = distributed.group.WORLD if self.size > 1 else None
        # State of the random numbers that all processes share; None before the first are drawn.
        self._shared: dict[str, Tensor | None] | None = None

    def on_main(self, action: Callable[[], Any]) -> Any:
        """The result of ``action``, carried out by the main process alone; what it raises is raised in all."""
        if self.group is None:
            return action()
        result, failure = None, None
        if self.main:
            try:
                result = action()
            except (ValueError, TrainingError) as error:
                failure = error
        outcome = [result, failure]
        distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in all of them."""
        values = [value] * self.size
        if self.group is not None:
            distributed.all_gather_object(values, value)
        return values

    def require_same(self, settings: dict[str, Any]) -> None:
        """Raises TrainingError, in every process, where the processes do not have the same settings."""
        for rank, other in enumerate(self.gather(settings)):
            for name, value in settings.items():
                if other[name] != value:
                    raise TrainingError(
                        f"all processes of a run must have the same {name}; process {rank} has {other[name]}, "
                        f"process {self.rank} has {value}"
                    )

    def require_devices(self, device: torch.device) -> None:
        """Raises ValueError where processes of this machine would have to share a GPU."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.group is not None and device.type == "cuda" and processes > torch.cuda.device_count():
            raise ValueError(
                f"--device cuda needs a GPU for each process: {processes} processes and {torch.cuda.device_count()} GPUs "
                "on this machine; lower --nproc-per-node, or use --device cpu"
            )

    def start_alike(self, networks: Iterable[nn.Module]) -> None:
        """Give every process the main one's parameters and buffers."""
        if self.group is not None:
            for network in networks:
                for tensor in (*network.parameters(), *network.buffers()):
                    distributed.broadcast(tensor.detach(), 0)

    def share(self, rows: Tensor, parts: int = 1) -> Tensor:
        """This process's rows of a whole batch that consists of ``parts`` equal parts: a share of each part."""
        return rows.unflatten(0, (parts, self.size, -1))[:, self.rank].flatten(0, 1)

    def draw(self, random_numbers: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Random numbers of the whole batch, the same in every process and for any number of processes.

        What a process draws by itself until the next call (noise layers, augmentation) differs from process to
        process, and follows from the shared state and the process's number, so that a resumed run repeats it.
        """
        if self.group is None:
            return random_numbers()
        if self._shared is not None:
            set_random_state(self._shared, device)
        numbers = random_numbers()
        self._shared = random_state(device)
        drawn = b"".join(state.numpy().tobytes() for state in self._shared.values() if state is not None)
        torch.manual_seed(zlib.crc32(drawn + self.rank.to_bytes(8, "little")))
        return numbers

    def random_state(self, device: torch.device) -> dict[str, Tensor | None]:
        """The state from which a run goes on: that of the shared random numbers."""
        return self._shared or random_state(device)

    def average(self, parameters: Iterable[nn.Parameter], loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """Average the gradients over the processes, in place, by one all-reduce.

        Returns:
            The mean loss, which is not finite where that of any process is not, and whether any process is to stop.
        """
        if self.group is None:
            return loss, stop
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.view(1), loss.new_tensor([float(stop)])])
        distributed.all_reduce(flat)
        *averages, loss, stops = (flat / self.size).split([*(gradient.numel() for gradient in gradients), 1, 1])
        for gradient, average in zip(gradients, averages):
            gradient.copy_(average.view_as(gradient))
        return loss[0], bool(stops)

    def mean(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """The figures' means over the processes."""
        if self.group is None:
            return figures
        values = torch.tensor([float(figure) for figure in figures.values()])
        distributed.all_reduce(values)
        return dict(zip(figures, values / self.size))

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.group is not None:
            distributed.barrier()


def random_state(device: torch.device) -> dict[str, Tensor | None]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state: dict[str, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Joins the processes that torchrun started, and parts from them at the end; does nothing in other runs.

    Raises:
        TrainingError: another process of the run ended before this one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        distributed.init_process_group(backend)
        yield Ranks()
    except TrainingError:
        raise
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise TrainingError(
                f"process {os.environ['RANK']}: another process of the run has ended, whose own message says why"
            ) from error
        raise
    # After an error the others may be waiting for this process, and torchrun ends them.
    distributed.destroy_process_group()


def resume_words() -> list[str]:
    """What starts a script again as this process was started: torchrun with the same number of processes, or Python."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ["python"]
    words = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    return words if nodes == 1 else [*words, "--nnodes", str(nodes)]
