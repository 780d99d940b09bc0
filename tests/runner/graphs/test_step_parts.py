"""The results of a step that ran as two parts come in the order of the whole step."""

from dataclasses import dataclass

from nanovllm.engine.scheduler_output import ModelRunnerOutput
from nanovllm.runner.graphs.step_parts import PendingParts


@dataclass
class Done:
    output: ModelRunnerOutput

    def result(self) -> ModelRunnerOutput:
        return self.output


def test_tokens_and_failures_are_put_in_order() -> None:
    decodes = ModelRunnerOutput(token_ids=[[10], [11]], failures={1: "decode failed"})
    others = ModelRunnerOutput(token_ids=[[20], [21]], failures={0: "prompt failed"})
    whole = PendingParts(Done(decodes), Done(others), [False, True, False, True]).result()
    assert whole.token_ids == [[20], [10], [21], [11]]
    assert whole.failures == {0: "prompt failed", 3: "decode failed"}
