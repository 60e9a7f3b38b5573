"""What the rows say, in words and tables: computed, so that another GPU gives another sentence.

All that notebooks and pages ask is here by name; each module answers for one kind of rows.
"""

# ruff: noqa: F403
from fluxnb.findings.caches import *
from fluxnb.findings.combined import *
from fluxnb.findings.machine import *
from fluxnb.findings.masks import *
from fluxnb.findings.parallel import *
from fluxnb.findings.peers import *
from fluxnb.findings.phases import *
from fluxnb.findings.planned import *
from fluxnb.findings.recommend import *
from fluxnb.findings.rows import *
from fluxnb.findings.serving import *
from fluxnb.findings.single_gpu import *
from fluxnb.findings.survival import *
from fluxnb.findings.table import *
from fluxnb.findings.trained import *
from fluxnb.findings.use_cases import *
from fluxnb.findings.words import *
