//! The security context: who a process is and what it may do.

use anyhow::{Context, Result};
use brig_hypervisor::jail::audit::{Extent, differences, filters};
use brig_tests::node::check::{contains, contains_one, equal, that};
use k8s_cri::v1::{
    Capability, Int64Value, SecurityProfile, SupplementalGroupsPolicy,
    security_profile::ProfileType,
};

use crate::container::Container;
use crate::node::Directory;
use crate::pod::profile;
use crate::stream::Forwarded;
use crate::suite::{Case, SLEEP, Suite, case, not_here, refused, smoke};

use super::life::sandbox_pid;

pub const CASES: &[Case] = &[
    smoke(
        "security",
        "runAsUser, runAsGroup and supplemental groups",
        user,
    ),
    case(
        "security",
        "a user by its name, with the image's groups",
        username,
    ),
    case(
        "security",
        "the default capabilities are the same, for exec too",
        default_capabilities,
    ),
    case(
        "security",
        "capabilities are added and dropped",
        capabilities,
    ),
    case("security", "drop ALL leaves none", drop_all),
    case("security", "read-only root file system", read_only_root),
    smoke(
        "security",
        "privileged: all capabilities, sysfs writable",
        privileged,
    ),
    case(
        "security",
        "a privileged pod sees none of the node's disks in Brig",
        node_devices,
    ),
    smoke(
        "security",
        "the living VMM has what the jail's list allows and no more",
        audited,
    ),
    case("security", "masked and read-only paths", masked),
    smoke(
        "security",
        "seccomp RuntimeDefault is enforced",
        seccomp_default,
    ),
    case(
        "security",
        "seccomp Unconfined is not filtered",
        seccomp_unconfined,
    ),
    case(
        "security",
        "seccomp Localhost: the profile's file is enforced",
        seccomp_localhost,
    ),
    case(
        "security",
        "allowPrivilegeEscalation=false sets no_new_privs",
        no_new_privs,
    ),
    smoke("security", "sysctls of the pod's namespaces", sysctls),
    case(
        "security",
        "a sysctl of the whole node is refused by its name",
        foreign_sysctl,
    ),
    case(
        "security",
        "procMount Unmasked: nothing is masked",
        unmasked,
    ),
    case(
        "security",
        "supplementalGroupsPolicy Strict: only what was asked for",
        strict_groups,
    ),
    case(
        "security",
        "a device of the node: read by who asks to read it",
        device,
    ),
    case(
        "security",
        "SELinux options do not hinder the start",
        selinux,
    ),
    case(
        "security",
        "AppArmor RuntimeDefault does not hinder the start",
        apparmor,
    ),
];

fn int(value: i64) -> Option<Int64Value> {
    Some(Int64Value { value })
}

fn user(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("user", SLEEP)
        .security(|security| {
            security.run_as_user = int(1234);
            security.run_as_group = int(5678);
            security.supplemental_groups = vec![2000, 70_000];
        })
        .start()?;
    let script = "id -u; id -g; grep ^Groups: /proc/self/status; grep ^CapEff /proc/1/status";
    let text = container.sh(script)?;
    let lines: Vec<_> = text.lines().collect();
    equal(
        "uid and gid",
        ["1234", "5678"].as_slice(),
        lines.get(..2).context("lines")?,
    )?;
    for group in ["2000", "70000"] {
        contains("groups", group, lines.get(2).context("no groups")?)?;
    }
    contains(
        "no capability",
        "0000000000000000",
        lines.get(3).context("no capabilities")?,
    )
}

fn username(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("username", SLEEP)
        .security(|security| security.run_as_username = "app".to_owned())
        .start()?;
    equal("id", "1000 1000", container.sh("echo $(id -u) $(id -g)")?)?;
    let groups = container.sh("grep ^Groups: /proc/1/status")?;
    contains("the image's group of it", "2000", &groups)
}

fn status_field(container: &Container, pid: &str, field: &str) -> Result<String> {
    container.sh(&format!(
        "awk '/^{field}:/ {{ print $2 }}' /proc/{pid}/status"
    ))
}

fn default_capabilities(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    // containerd's fourteen.
    const DEFAULT: &str = "00000000a80425fb";
    const NONE: &str = "0000000000000000";
    let expected = format!(
        "CapInh:\t{NONE}\nCapPrm:\t{DEFAULT}\nCapEff:\t{DEFAULT}\nCapBnd:\t{DEFAULT}\nCapAmb:\t{NONE}"
    );
    for pid in ["1", "self"] {
        let script = format!("grep ^Cap /proc/{pid}/status");
        equal(pid, expected.as_str(), shared.container.sh(&script)?)?;
    }
    Ok(())
}

fn capabilities(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("capabilities", SLEEP)
        .security(|security| {
            security.capabilities = Some(Capability {
                add_capabilities: vec!["NET_ADMIN".to_owned()],
                drop_capabilities: vec!["CHOWN".to_owned()],
                ..Capability::default()
            });
        })
        .start()?;
    container
        .sh("ip link add brig0 type bridge && ip link del brig0")
        .or_else(|_| {
            // A kernel without bridges: any change of a link will do.
            container.sh("ip link set lo mtu 65535")
        })?;
    let error = container.sh_fails("touch /f && chown 1 /f")?;
    contains_one("chown", &["not permitted"], &error)?;
    let error = shared.container.sh_fails("ip link set lo mtu 65535")?;
    contains_one("without NET_ADMIN", &["not permitted"], &error)
}

fn drop_all(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("drop-all", SLEEP)
        .security(|security| {
            security.capabilities = Some(Capability {
                drop_capabilities: vec!["ALL".to_owned()],
                ..Capability::default()
            });
        })
        .start()?;
    let none = "0000000000000000";
    equal(
        "permitted, effective and bounding set",
        format!("{none} {none} {none}"),
        container.sh("awk '/^Cap(Prm|Eff|Bnd)/ { print $2 }' /proc/1/status | xargs")?,
    )
}

fn read_only_root(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("read-only-root", SLEEP)
        .security(|security| security.readonly_rootfs = true)
        .start()?;
    let error = container.sh_fails("touch /x")?;
    contains_one("a write to /", &["read-only file system"], &error)?;
    container
        .sh("touch /dev/shm/x && rm /dev/shm/x && echo x > /dev/null")
        .map(drop)
}

fn privileged(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("privileged")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .security(|security| security.privileged = true)
        .start()?;
    // All that its kernel knows: the kernel says how many.
    let last: u32 = container.sh("cat /proc/sys/kernel/cap_last_cap")?.parse()?;
    let all = format!("{:016x}", (1_u64 << (last + 1)) - 1);
    equal("CapEff", all, status_field(&container, "1", "CapEff")?)?;
    equal("Seccomp", "0", status_field(&container, "1", "Seccomp")?)?;
    container.sh("mkdir /m && mount -t tmpfs none /m && umount /m")?;
    container.sh("sysctl -w net.ipv4.ip_forward=1")?;
    that(
        "/dev has the kernel's devices",
        container.sh("test -e /dev/kmsg && echo yes")? == "yes",
    )
}

/// runc gives a privileged container the node's devices; a VM has its own.
fn node_devices(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("node-devices")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let container = pod
        .container("main", SLEEP)
        .security(|security| security.privileged = true)
        .start()?;
    let disk = container.exec(&["test", "-b", "/dev/vda"])?.code == 0;
    equal("the node's disk is there", !suite.is_brig(), disk)
}

/// In the middle of its work: a pod with outputs, its files and network, whose port is being forwarded.
fn audited(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("runc has no VMM");
    }
    let shared = suite.shared()?;
    shared
        .container
        .sh("echo served > /tmp/page && httpd -p 127.0.0.1:8111 -h /tmp")?;
    let mut stream = Forwarded::open(&shared.pod, 8111)?;
    let vmm = u32::try_from(sandbox_pid(&shared.pod)?)?;
    let mut found = differences(vmm, Extent::Filtered)?;
    found.extend(filters::differences(vmm)?);
    equal("differences", String::new(), found.join("; "))?;
    stream.send(b"GET /page HTTP/1.0\r\n\r\n")?;
    let (answer, reason) = stream.finish()?;
    let answer = String::from_utf8_lossy(&answer);
    contains("what the stream brought", "served", &answer)
        .with_context(|| format!("reason given: '{reason}'"))
}

fn masked(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    // What a kernel lacks need not be masked.
    let script = "head -c 9 /proc/kcore 2>/dev/null | wc -c; head -c 9 /proc/timer_list | wc -c; ls -A /sys/firmware | wc -l";
    equal(
        "bytes in /proc/kcore, in /proc/timer_list, entries in /sys/firmware",
        "0\n0\n0",
        shared.container.sh(script)?,
    )?;
    let writes = "echo 1 > /proc/sys/vm/drop_caches && echo drop_caches; echo h > /proc/sysrq-trigger && echo sysrq; mkdir /sys/fs/cgroup/x && echo cgroup; true";
    equal("writes that worked", "", shared.container.sh(writes)?)?;
    let error = shared
        .container
        .sh_fails("echo x > /proc/sys/kernel/hostname")?;
    contains_one("/proc/sys", &["read-only file system"], &error)
}

fn seccomp_default(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    for pid in ["1", "self"] {
        equal(
            "Seccomp",
            "2",
            status_field(&shared.container, pid, "Seccomp")?,
        )?;
    }
    // unshare(CLONE_NEWUSER) needs no capability, so only the filter refuses it.
    let error = shared.container.sh_fails("unshare -U true")?;
    contains_one("unshare", &["not permitted"], &error)
}

fn seccomp_unconfined(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("unconfined", SLEEP)
        .security(|security| security.seccomp = Some(profile(ProfileType::Unconfined)))
        .start()?;
    equal("Seccomp", "0", status_field(&container, "1", "Seccomp")?)
}

fn seccomp_localhost(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let directory = Directory::new("seccomp")?;
    // 95 is EOPNOTSUPP: no other refusal of mkdir says that.
    let rule = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#;
    let file = directory.file("profile.json", rule)?;
    let container = shared
        .pod
        .container("localhost", SLEEP)
        .security(|security| {
            security.seccomp = Some(SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: file.display().to_string(),
            });
        })
        .start()?;
    let error = container.sh_fails("mkdir /x")?;
    contains_one("mkdir", &["not supported"], &error)?;
    equal("Seccomp", "2", status_field(&container, "1", "Seccomp")?)
}

fn no_new_privs(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("no-new-privs", SLEEP)
        .security(|security| security.no_new_privs = true)
        .start()?;
    for pid in ["1", "self"] {
        equal(
            "NoNewPrivs",
            "1",
            status_field(&container, pid, "NoNewPrivs")?,
        )?;
    }
    equal(
        "by default",
        "0",
        status_field(&shared.container, "1", "NoNewPrivs")?,
    )
}

fn sysctls(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("sysctls")
        .sysctl("kernel.shm_rmid_forced", "1")
        .sysctl("net.ipv4.ip_local_port_range", "20000 30000")
        .sysctl("net.core.somaxconn", "777")
        .sysctl("kernel.msgmax", "16384")
        .run(&suite.cri)?;
    let container = pod.container("main", SLEEP).start()?;
    for (name, value) in [
        ("kernel/shm_rmid_forced", "1"),
        ("net/ipv4/ip_local_port_range", "20000\t30000"),
        ("net/core/somaxconn", "777"),
        ("kernel/msgmax", "16384"),
    ] {
        equal(name, value, container.sh(&format!("cat /proc/sys/{name}"))?)?;
    }
    Ok(())
}

/// runc knows that the kernel has one of it. A VM has one of its own, but what the pod of another
/// runtime cannot ask for is refused there too.
fn foreign_sysctl(suite: &mut Suite) -> Result<()> {
    let pod = suite
        .pod("foreign-sysctl")
        .sysctl("vm.swappiness", "7")
        .run(&suite.cri);
    if !suite.is_brig() {
        return refused("vm.swappiness", pod, &["vm.swappiness"]);
    }
    // Its own kernel's: applied there, and the node's stays.
    let before = std::fs::read_to_string("/proc/sys/vm/swappiness")?;
    let outcome = match pod {
        Err(error) => contains_one("the refusal", &["vm.swappiness"], &format!("{error:#}")),
        Ok(pod) => {
            let container = pod.container("main", SLEEP).start()?;
            equal("inside", "7", container.sh("cat /proc/sys/vm/swappiness")?)
        }
    };
    equal(
        "the node's",
        before,
        std::fs::read_to_string("/proc/sys/vm/swappiness")?,
    )?;
    outcome
}

fn unmasked(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("unmasked", SLEEP)
        .security(|security| {
            security.masked_paths.clear();
            security.readonly_paths.clear();
        })
        .start()?;
    let script = "test $(head -c 9 /proc/timer_list | wc -c) = 9 && grep -c ' /proc' /proc/mounts";
    equal("mounts at and below /proc", "1", container.sh(script)?)
}

/// The image puts `app` into the group 2000.
fn strict_groups(suite: &mut Suite) -> Result<()> {
    if suite.containerd.starts_with("1.") {
        return not_here("containerd has the policy since 2.0");
    }
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("strict-groups", SLEEP)
        .security(|security| {
            security.run_as_user = int(1000);
            security.run_as_group = int(1000);
            security.supplemental_groups = vec![4000];
            security.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
        })
        .start()?;
    let groups = container.sh("id -G | tr ' ' '\\n' | sort -n | tr '\\n' ' '")?;
    equal("groups", "1000 4000", groups)
}

/// A device plugin's: the node's own disk, which nobody but this container sees, and it cannot write to it.
fn device(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("device", SLEEP)
        .edit(|config| {
            config.devices.push(k8s_cri::v1::Device {
                container_path: "/dev/brig-disk".to_owned(),
                host_path: "/dev/vda".to_owned(),
                permissions: "r".to_owned(),
            });
        })
        .start()?;
    equal(
        "bytes read",
        "512",
        container.sh("head -c 512 /dev/brig-disk | wc -c")?,
    )?;
    container
        .sh_fails("dd if=/dev/zero of=/dev/brig-disk bs=512 count=1 conv=notrunc")
        .map(drop)
}

fn selinux(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("selinux", SLEEP)
        .security(|security| {
            security.selinux_options = Some(k8s_cri::v1::SeLinuxOption {
                user: "system_u".to_owned(),
                role: "system_r".to_owned(),
                r#type: "container_t".to_owned(),
                level: "s0:c1,c2".to_owned(),
            });
        })
        .start()?;
    container.sh("true").map(drop)
}

fn apparmor(suite: &mut Suite) -> Result<()> {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if enabled.map(|text| text.trim() != "Y").unwrap_or(true) {
        return not_here("this node has no AppArmor, and containerd refuses the profile itself");
    }
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("apparmor", SLEEP)
        .security(|security| security.apparmor = Some(profile(ProfileType::RuntimeDefault)))
        .start()?;
    container.sh("true").map(drop)
}
