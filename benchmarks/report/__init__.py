"""Self-contained HTML: the page of an audit, and the report of benchmarks, one record beside an earlier one."""
