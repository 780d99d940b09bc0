"""AdapterGraphRunner: CUDA graphs in two kinds, of steps without adapters and of steps with some.

Owns the choice. Invariant: a step without adapters replays the graph that an engine without them would; the others'
are captured when they first come, and anew once an adapter has layers that none had before.
"""

from nanovllm.config import ResolvedConfig
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.model_config import ModelConfig
from nanovllm.runner.adapter_runner import AdapterRunner
from nanovllm.runner.graphs.graph_runner import GraphRunner
from nanovllm.runner.model_runner import PendingTokens


class AdapterGraphRunner(GraphRunner):
    def __init__(self, runner: AdapterRunner, config: ResolvedConfig, model_config: ModelConfig) -> None:
        super().__init__(runner, config, model_config)
        self._adapters = runner
        self._plain = self._graphs
        self._adapted = self._make_graphs()
        self._generation = 0  # of what they were captured with

    def _run(self, plan: SchedulerOutput) -> PendingTokens:
        if not self._adapters.has_adapters(plan):
            return super()._run(plan)
        if self._generation != self._adapters.store.generation:
            self._generation, self._adapted = self._adapters.store.generation, self._make_graphs()
        self._graphs = self._adapted
        try:
            with self._adapters.adapted(True):
                return super()._run(plan)
        finally:
            self._graphs = self._plain
