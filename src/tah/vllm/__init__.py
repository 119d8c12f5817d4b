"""Plugin of vLLM that serves TaH models; docs/explanation/serving.md explains how."""
