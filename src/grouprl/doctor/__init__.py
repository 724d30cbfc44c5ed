"""What is wrong with a run, as its metrics show it, and what to try.

A *rule* is one small pure function: it reads a :class:`~grouprl.doctor.table.Table` of metrics and settings and gives a
:class:`~grouprl.doctor.table.Diagnosis`, or None. `signs` holds the rules that both arenas share, `environments` and
`language` name the columns and settings of each arena and add its own rules. `examine` reads a run folder, and `watch`
looks at a run while it goes on. The room knows neither arena: it reads numbers and names.
"""

from grouprl.doctor.examine import examine, examine_table, to_text
from grouprl.doctor.table import Diagnosis, Table
from grouprl.doctor.watch import Watch

__all__ = ["Diagnosis", "Table", "Watch", "examine", "examine_table", "to_text"]
