#!/bin/busybox sh
# The first process of the guest: mounts, modules, then steps from the host, one after another, until the machine ends.
#
# A step comes as a line `ID SECONDS SCRIPT` with the script in base64. What goes back is a line
# `done ID CODE OUT ERR` with the exit code and the lengths of both outputs, and then the outputs.
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /root /mnt /home/user /sbin /usr/bin /usr/sbin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs run /run
chmod 777 /home/user
ln -s /proc/mounts /etc/mtab
ip link set lo up 2>/dev/null
while read -r module; do
    insmod "/modules/$module.ko" || echo "guest: cannot load $module"
done </modules/order
chmod 666 /dev/fuse
port=/dev/vport0p1
while [ ! -c "$port" ]; do usleep 20000; done
ln -s /dev/vport0p2 /dev/events
exec 3<>"$port"
echo "ready" >&3
while :; do
    if ! read -r id seconds script <&3; then
        usleep 20000
        continue
    fi
    echo "$script" | base64 -d >/run/step
    timeout -s KILL "$seconds" sh /run/step </dev/null >/run/out 2>/run/err 3>&-
    code=$?
    { echo "done $id $code $(stat -c %s /run/out) $(stat -c %s /run/err)"; cat /run/out /run/err; } >&3
done
