"""Makes `python -m bench.gpu` run the measurement, because the room has the command's name."""

from bench.gpu.measure import main

main()
