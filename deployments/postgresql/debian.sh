#!/bin/sh
# The same with Debian's packages, as root: a database that only this machine reaches. The password is
# made here and goes to /etc/nested-tune/server.env, which only root can read (systemd reads it as root).
set -eu
umask 077
apt-get install -y postgresql
id nested-tune >/dev/null 2>&1 ||
    useradd --system --create-home --home-dir /var/lib/nested-tune nested-tune
mkdir -p /etc/nested-tune
password=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
auth=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
cd /tmp
runuser -u postgres -- psql -v ON_ERROR_STOP=1 -v password="$password" <<'SQL'
CREATE ROLE prefect LOGIN PASSWORD :'password';
CREATE DATABASE prefect OWNER prefect;
SQL
cat >/etc/nested-tune/server.env <<SECRETS
PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://prefect:$password@127.0.0.1:5432/prefect
PREFECT_SERVER_API_AUTH_STRING=admin:$auth
PREFECT_API_AUTH_STRING=admin:$auth
SECRETS
cat >/etc/nested-tune/worker.env <<SECRETS
PREFECT_API_AUTH_STRING=admin:$auth
SECRETS
echo "Written: server.env and worker.env in /etc/nested-tune. Next: settings.env beside them, and the units."
