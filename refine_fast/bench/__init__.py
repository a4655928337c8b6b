"""The benchmark suite: ``refine-fast bench``, and ``pytest benchmarks/`` over the same contenders.

What a fair comparison is here:

- Every contender gets the same inputs and computes the same thing; ``tests/test_bench.py`` checks
  that it does. What a peer cannot do (faiss has no band) is said in its description.
- One round is not counted: it takes imports, compilation, thread pools and first touches of memory.
- The contenders take turns (A B C, B C A, ...), each round starting with another one, because the
  speed of a machine drifts. Look at ratios within one run, never at times of two runs.
- A sample is one call, its wall time and its CPU time, that of child processes included. On a busy
  machine the CPU time is the one to trust. GPUs are waited for on both sides.
- Memory is measured in a process of its own, which makes the inputs, warms up on tiny ones and
  reports by how much one call raises its peak resident size, the results included. It is forked
  from one that has done the imports.
- The roofline is measured in the same run: the rates of a matrix product and of a copy, by dtype,
  take their turns with the contenders. ``matrix`` is the faster of torch's product and of the
  product in our kernels. The fraction of the roofline is the time that the operation's FLOPs and
  bytes need at these rates over its CPU seconds a thread (on a GPU: its wall time). It may exceed 1
  where an operation needs less than the arithmetic of its dtype: band_topk screens in 8 or 16 bits
  and rescores what is close. That of fuse is the disk's time for the same bytes over its own.

How to read a row of ``benchmarks/results/<device>.csv``: ``provider`` did ``op`` in ``mode`` on
inputs of ``dtype`` and ``shape``; ``p20``, ``p50`` and ``p80`` are percentiles of ``metric`` in
``unit``; ``ratio_to_peer`` is the median over that of ``peer`` in the same run, so 0.5 is half of
its time or memory. ``gflop`` and ``gb`` are the work that the operation needs at least, by its
formula; ``tflops`` and ``gb_per_s`` are that work over the time of the fraction. ``commit`` is that
of the checkout, or of the sources that an installed package was built from; "+" says that the code
differs from it. A row's key is everything but its values, commit and time, so a re-run overwrites
it. The scaling plots show the rows of one thread: every size of which three values were measured
while the others stayed.

How to add a contender: write a function of the operation's inputs in ``operations/<op>.py`` that
imports what it needs inside, and add a ``Contender`` with its name, the function, the package that
it needs and a sentence on what its user should know. The test of agreement, the tables, the plots
and ``pytest benchmarks/`` follow. An operation is a module there with ``OPERATIONS``, listed in
``operations/__init__.py``.
"""
