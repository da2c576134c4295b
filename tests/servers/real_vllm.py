"""A real vLLM on this CPU: the Python of its environment, named by HBA_VLLM (`make test-vllm`), and its settings."""

import os

VLLM = os.environ.get("HBA_VLLM")
CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
