"""Room at the vLLM servers: the jobs that will soon need a place, and who waits for one. No I/O."""

from collections import Counter


class Demand:
    """A job that was started here and has no server yet. Until its end it counts against the room of its model."""

    __slots__ = ("_demands", "model")

    def __init__(self, demands: "Demands", model: str) -> None:
        self.model = model
        self._demands: Demands | None = demands
        demands.by_model[model] += 1

    def end(self) -> None:
        """End the demand: the job has reserved a server, or needs none. A second call has no effect."""
        demands, self._demands = self._demands, None
        if demands is not None:
            demands.by_model[self.model] -= 1
            if not demands.by_model[self.model]:
                del demands.by_model[self.model]


class Demands:
    """All demands of a process, by model."""

    def __init__(self) -> None:
        self.by_model: Counter[str] = Counter()
