import logging

# Wherever PEFT is imported it warns, on processors with bfloat16 instructions, of kernels that it would fetch from the
# network. Training needs none of them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
