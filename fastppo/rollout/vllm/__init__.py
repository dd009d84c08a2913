"""The engine `rollout.engine: vllm`: sampling by vLLM, what it can do, and how it is started."""
