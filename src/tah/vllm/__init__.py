"""The plugin that serves TaH models in vLLM."""
