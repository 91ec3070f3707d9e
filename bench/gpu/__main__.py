"""Makes `python -m bench.gpu` run the measurement, since the room has the command's name."""

from bench.gpu.measure import main

main()
