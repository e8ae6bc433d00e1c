"""What `register` names as the model under a vLLM that the plugin does not know: to import it is to be told so."""

from arkasr.vllm_plugin import check_version

check_version()
