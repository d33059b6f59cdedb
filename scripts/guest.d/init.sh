#!/busybox sh
# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=dash
#
# PID 1 of the guests of scripts/guest: works in rounds, each with disk, rng,
# timers and IPIs, and says on the console what each round did, until the host
# sends a line.  Then it says "guest: done", or earlier "guest: failed" and the
# reason, waits for another line, so that the host can read the statistics, and
# powers off.  guest=xen on the kernel's command line means a Xen guest.
/busybox mkdir -p /bin /proc /sys /dev /tmp
/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec < /dev/console > /dev/console 2>&1

say() { echo "guest: $*"; }
end() {
	say "$*"
	read -r _
	poweroff -f
}

# A Xen guest has to use event channels for all of it.
# shellcheck disable=SC2154 # guest is from the kernel's command line
if [ "$guest" = xen ]; then
	timer='-virq .*timer' ipi='-ipi ' msi='xen-pirq .*virtio'
else
	timer='LOC:|arch_timer' ipi='RES:|CAL:|IPI[0-9]+:' msi='MSI.*virtio'
fi

# irqs PATTERN: how many interrupts so far
irqs() {
	awk -v p="$1" 'NR == 1 { cpus = NF } $0 ~ p { for (i = 2; i <= cpus + 1; i++) n += $i } END { print n + 0 }' \
		/proc/interrupts
}

# What is written to the disk comes back; each block is a request.
disk() {
	dd if=/dev/urandom of=/tmp/a bs=4k count=32 &&
	dd if=/tmp/a of=/dev/vda bs=4k oflag=direct &&
	dd if=/dev/vda of=/tmp/b bs=4k count=32 iflag=direct &&
	cmp /tmp/a /tmp/b
}

rng() { dd if=/dev/hwrng of=/dev/null bs=64 count=32; }

timers() {
	for _ in 0 1 2 3 4 5 6 7 8 9; do
		usleep 10000
	done
}

# A word goes to the other CPU and back, a hundred times.
ipis() {
	rm -f /tmp/there /tmp/back
	mkfifo /tmp/there /tmp/back
	taskset 2 sh -c 'while read -r word; do echo "$word"; done < /tmp/there > /tmp/back' &
	other=$!
	taskset 1 sh -c 'exec 3> /tmp/there 4< /tmp/back
		i=0
		while [ $i -lt 100 ]; do
			echo $i >&3
			read -r word <&4
			[ "$word" = $i ] || exit 1
			i=$((i + 1))
		done' && wait $other
}

n=0
(read -r _ && touch /tmp/end) < /dev/console &
until [ -e /tmp/end ]; do
	n=$((n + 1))
	t=$(irqs "$timer") i=$(irqs "$ipi") m=$(irqs "$msi")
	for job in disk rng timers ipis; do
		$job 2> /tmp/log || { cat /tmp/log; end "failed: $job in round $n"; }
	done
	t=$(($(irqs "$timer") - t)) i=$(($(irqs "$ipi") - i)) m=$(($(irqs "$msi") - m))
	say "round $n: timers +$t, IPIs +$i, MSIs +$m"
	if [ "$t" -le 0 ] || [ "$i" -le 0 ] || [ "$m" -le 0 ]; then
		cat /proc/interrupts
		end "failed: interrupts did not move in round $n"
	fi
done
end 'done'
