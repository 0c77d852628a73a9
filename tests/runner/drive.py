"""Drives a runner by hand, with plans of one's own making."""

from tokenry.params import SamplingParams
from tokenry.plan import NewRequest, Row, StepPlan

GREEDY = SamplingParams(temperature=0, max_tokens=100)


class Driver:
    """Gives each request blocks of its own and plans what it is told to."""

    def __init__(self, runner):
        self.runner = runner
        self.step = 0
        self.free = list(range(runner.plan.num_blocks - 1, 0, -1))
        self.held = {}
        self.known = {}
        self.computed = {}
        self.blocks = {}
        self.new = []
        self.forget = []
        self.pending = []

    def add(self, name, tokens, params=GREEDY, seed=0):
        self.known[name] = len(tokens)
        self.computed[name] = 0
        self.blocks[name] = 0
        self.held[name] = []
        self.new.append(
            NewRequest(
                request_id=name,
                token_ids=tuple(tokens),
                num_prompt=len(tokens),
                params=params,
                seed=seed,
            )
        )

    def drop(self, name):
        """Forget a request with the next plan; its blocks are for others from then on."""
        if all(new.request_id != name for new in self.new):
            self.forget.append(name)
        self.new = [new for new in self.new if new.request_id != name]
        self.free += self.held.pop(name)

    def plan(self, shares):
        """shares: {name: tokens to compute}; a token is drawn when the row reaches the last one."""
        rows = []
        for name, count in shares.items():
            end = self.computed[name] + count
            needed = -(-end // self.runner.block_size) - self.blocks[name]
            ids = tuple(self.free.pop() for _ in range(needed))
            self.held[name] += ids
            self.blocks[name] += len(ids)
            sample = end == self.known[name]
            rows.append(
                Row(
                    request_id=name,
                    num_computed=self.computed[name],
                    num_new=count,
                    new_block_ids=ids,
                    sample=sample,
                )
            )
            self.computed[name] = end
            self.known[name] += sample
        self.step += 1
        new = tuple(n for n in self.new if n.request_id in shares)
        self.new = [n for n in self.new if n.request_id not in shares]
        plan = StepPlan(step=self.step, new=new, rows=tuple(rows), forget=tuple(self.forget))
        self.forget = []
        return plan

    def run(self, shares):
        """One step, waited for; {name: RowResult}."""
        result = self.runner.run(self.plan(shares))()
        return {row.request_id: row for row in result.rows}

    def launch(self, shares):
        """One step, not waited for."""
        return self.runner.run(self.plan(shares))
