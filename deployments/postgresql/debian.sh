#!/bin/sh
# The same with Debian's packages, as root: a database that only this machine reaches. The password is
# made here and goes to /etc/nested-tune/secrets.env, which only root and the service can read.
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
cat >/etc/nested-tune/secrets.env <<SECRETS
PREFECT_API_DATABASE_CONNECTION_URL=postgresql+asyncpg://prefect:$password@127.0.0.1:5432/prefect
PREFECT_SERVER_API_AUTH_STRING=admin:$auth
PREFECT_API_AUTH_STRING=admin:$auth
SECRETS
echo "Written: /etc/nested-tune/secrets.env. Next: settings.env beside it, and the systemd units."
