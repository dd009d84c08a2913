"""The table of modelled seconds in docs/cost-model.md: presets on 1 to 64 nodes of 8 GPUs, from datasheets.

    python bench/cost_table.py [--node h100] [--presets 1.3b 7b 13b 70b]

Needs no GPU and no weights: models have the published shapes of those that the presets name (tests/architectures.py).
The batch grows with the nodes, 512 responses for each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fastppo.config import PPO, parse
from fastppo.planner.constants.nodes import constants_of, node_named
from fastppo.planner.machine import Machine
from fastppo.planner.plan import make_plan, measured_roles
from fastppo.planner.time.predict import lengths_of, predict
from fastppo.planner.time.table import seconds_text

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
NODES = (1, 2, 4, 8, 16, 32, 64)
RESPONSES = 512  # of a step on each node
PHASES = ("sampling", "feedback", "experience", "learning")


def main() -> None:
    parser = argparse.ArgumentParser(description="Modelled seconds of the presets' steps.")
    parser.add_argument("--node", default="h100")
    parser.add_argument("--presets", nargs="+", default=["1.3b", "7b", "13b", "70b"])
    options = parser.parse_args()
    from architectures import preset

    node, constants = node_named(options.node), constants_of(options.node)
    print(f"| preset | nodes | step | {' | '.join(PHASES)} | tokens/s | most of the time |")
    print(f"|{'---|' * (len(PHASES) + 5)}", flush=True)
    for name in options.presets:
        with tempfile.TemporaryDirectory() as folder:
            argv, roles = preset(Path(folder), name), None
            for nodes in NODES:
                machine = Machine(node.gpus, nodes, node.gpu_memory, node.host_memory)
                config = parse([*argv, "--ppo.batch_size", str(RESPONSES * nodes)], PPO, ranks=machine.ranks)
                roles = roles or measured_roles(config, cpu=False)
                plan = make_plan(config, machine, roles)
                if not plan.fits:
                    print(f"| `{name}` | {nodes} | does not fit |{' |' * (len(PHASES) + 2)}", flush=True)
                    continue
                step = predict(plan, constants, lengths_of(config))
                found = {phase.name: seconds_text(phase.seconds.total) for phase in step.phases}
                what, share = step.slowest
                cells = [f"`{name}`", str(nodes), seconds_text(step.seconds), *(found[phase] for phase in PHASES)]
                print(
                    f"| {' | '.join([*cells, f'{step.tokens / step.seconds:,.0f}', f'{what}, {share:.0%}'])} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
