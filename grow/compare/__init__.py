"""`grow compare`: short probes of several operators from one base at equal FLOPs, ranked with error bars."""
