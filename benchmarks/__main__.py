"""`make bench`: every measurement that needs no GPU, one after the other."""

from benchmarks import (
    cpu_training,
    finetune,
    flow_overhead,
    forecast,
    gate,
    memory,
    padding,
    reading,
    scaling,
    startup,
)

padding.main()
reading.main()
memory.main()
forecast.main()
startup.main()
finetune.main()
flow_overhead.main()
cpu_training.main()
scaling.main()
gate.main()
