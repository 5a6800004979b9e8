"""mini-swe-agent's own agent, model and local environment on a task; prints how it ended."""

import json
import sys

import yaml
from minisweagent.agents.default import DefaultAgent
from minisweagent.config import builtin_config_dir
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel


def main():
    settings = json.loads(sys.argv[1])
    shipped = yaml.safe_load((builtin_config_dir / "mini.yaml").read_text())
    known = ("system_template", "instance_template")
    model = LitellmModel(
        model_name=settings["model"],
        model_kwargs={"api_base": settings["api_base"], "api_key": "none", "num_retries": 0},
        observation_template=shipped["model"]["observation_template"],
        format_error_template=shipped["model"]["format_error_template"],
    )
    agent = DefaultAgent(
        model,
        LocalEnvironment(cwd=settings["cwd"]),
        **{name: shipped["agent"][name] for name in known},
        step_limit=5,
    )
    ended = agent.run(settings["task"])
    print(json.dumps(ended | {"roles": [message["role"] for message in agent.messages]}))


if __name__ == "__main__":
    main()
