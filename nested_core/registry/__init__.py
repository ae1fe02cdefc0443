"""The registry: for each name, adapters that passed the gate, one champion, and its history.

A version never changes once it is registered. Each change of a name is a line of its history, and
the history decides: the link `champion`, champion.json and policy.json are derived from it. Every
writer of these holds the folder's lock, and first finishes what a crash interrupted. A reader of
several files holds the lock shared; `read_champion`, `list_versions` and `read_version_verdicts`
take no lock.

ledger.py is the history; link_and_views.py the folder under its lock with the derived files;
versions.py a version; judgements.py its later verdicts; data_store.py its examples. registration.py
adds a version; promote_and_rollback.py changes the champion; queries.py reads; policy.py is the
minimum that a name requires for promotion. promotion_policy.py decides automatic promotion, and
trials.py finds runs whose repetition is useless; these two are imported where they are used. The
room housekeeping audits a registry and removes versions.
"""

from nested_core.registry.folders import list_names as list_names
from nested_core.registry.promote_and_rollback import UNSET as UNSET
from nested_core.registry.promote_and_rollback import Unset as Unset
from nested_core.registry.promote_and_rollback import register_and_promote as register_and_promote
from nested_core.registry.promote_and_rollback import rollback as rollback
from nested_core.registry.promotion_outcome import Decision as Decision
from nested_core.registry.queries import VerifiedVersion as VerifiedVersion
from nested_core.registry.queries import check_champion as check_champion
from nested_core.registry.queries import history as history
from nested_core.registry.queries import holding_champion as holding_champion
from nested_core.registry.queries import list_versions as list_versions
from nested_core.registry.queries import read_champion as read_champion
from nested_core.registry.queries import read_champion_changes as read_champion_changes
from nested_core.registry.queries import read_rollback_target as read_rollback_target
from nested_core.registry.queries import read_verified_version as read_verified_version
from nested_core.registry.queries import read_version_verdicts as read_version_verdicts
from nested_core.registry.queries import verify as verify
