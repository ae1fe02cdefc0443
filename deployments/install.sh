#!/bin/sh
# Once, as root, on Debian or Ubuntu: the user nested-tune, its folder, settings, secrets and units.
#   sh deployments/install.sh debian   PostgreSQL is Debian's package, and Prefect's server a unit
#   sh deployments/install.sh docker   both are containers: postgresql/compose.yaml
set -eu
case "${1:-}" in
debian | docker) ;;
*)
    echo "usage: sh deployments/install.sh debian|docker" >&2
    exit 2
    ;;
esac
files=$(cd "$(dirname "$0")" && pwd)
if [ -e /etc/nested-tune/server.env ]; then
    echo "/etc/nested-tune/server.env exists: nothing was changed. Upgrades need no install.sh." >&2
    exit 1
fi

id nested-tune >/dev/null 2>&1 ||
    useradd --system --create-home --home-dir /var/lib/nested-tune --shell /bin/bash nested-tune
cat >/var/lib/nested-tune/.profile <<'PROFILE'
set -a
. /etc/nested-tune/settings.env
. /etc/nested-tune/worker.env
NESTED_TUNE_HOME=/var/lib/nested-tune
NESTED_TUNE_CACHE=/var/lib/nested-tune/cache
set +a
PATH=/opt/nested-tune/.venv/bin:$PATH
PROFILE
chown nested-tune: /var/lib/nested-tune/.profile

install -d -m 755 /etc/nested-tune
install -m 644 "$files/settings.env" /etc/nested-tune/
install -m 644 "$files"/systemd/*.service /etc/systemd/system/

# Digits and letters alone: they need no quoting in a URL, a shell or systemd.
password=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
auth=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
if [ "$1" = debian ]; then
    apt-get install -y postgresql
    cd /tmp # the user postgres may not enter the folder that this began in
    runuser -u postgres -- psql -v ON_ERROR_STOP=1 -v password="$password" <<'SQL'
CREATE ROLE prefect LOGIN PASSWORD :'password';
CREATE DATABASE prefect OWNER prefect;
SQL
    database="PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://prefect:$password@127.0.0.1:5432/prefect"
else
    database="POSTGRES_PASSWORD=$password"
fi

umask 077
# Training runs as nested-tune and reads worker.env alone: it never holds the database's password.
cat >/etc/nested-tune/worker.env <<SECRETS
PREFECT_API_AUTH_STRING=admin:$auth
SECRETS
chgrp nested-tune /etc/nested-tune/worker.env
chmod 640 /etc/nested-tune/worker.env
cat >/etc/nested-tune/server.env <<SECRETS
$database
PREFECT_SERVER_API_AUTH_STRING=admin:$auth
PREFECT_API_AUTH_STRING=admin:$auth
SECRETS
echo "Done. Secrets are in server.env and worker.env in /etc/nested-tune. Next: start the server."
