"""A runner in the shape lm-eval wants; imports lm-eval, so only lm_eval_bridge imports it."""

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quant.display import printable
from quant.evaluation.lm_eval_requests import ROLLING, Requests, answer_until, likelihood
from quant.evaluation.runners import Runner


class RunnerModel(TemplateLM):
    """lm-eval's model interface over a Runner."""

    def __init__(self, runner: Runner, requests: Requests):
        super().__init__()
        self._runner, self._requests = runner, requests

    def _ask(self, kind: str, asked: list[tuple], answer) -> list:
        what = f"{printable(self._runner.name)} does tasks"
        return self._requests.answers(kind, asked, answer, what)

    @property
    def eot_token_id(self) -> int:
        return self._runner.eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self._runner.bos is None else self._runner.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = self._runner.tokenize(string, special=True).tolist()
        bos = self._runner.bos
        wants_bos = bos is not None and add_special_tokens is not False and ids[:1] != [bos]
        return [bos, *ids] if wants_bos else ids

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        asked = [(context, answer) for _, context, answer in requests]
        found = self._ask("likelihood", asked, lambda *each: likelihood(self._runner, *each))
        return [(log_p, is_greedy) for log_p, is_greedy in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        return self._ask("whole", [request.args[:1] for request in requests], self._whole)

    def _whole(self, text: str) -> float:
        """ln p of a document, in windows, each with one token before it."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=ROLLING,
            context_len=1,
        )
        pairs = map(make_disjoint_window, windows)
        return sum(likelihood(self._runner, context, answer)[0] for context, answer in pairs)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return self._ask("until", [request.args for request in requests], self._answer)

    def _answer(self, prompt: str, settings: dict) -> str:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        return answer_until(self._runner, self.tok_encode(prompt), stops, settings)
