//! Real programs as pods: what operators run, with what they rely on.

use std::fs;
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use k8s_cri::v1::Protocol;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::config_volumes::Atomic;
use super::network::fetch_page;
use crate::container::{Container, eventually};
use crate::node::{APPS, DEBIAN, Directory};
use crate::pod::Pod;
use crate::suite::{Case, SLEEP, Suite, case, smoke};

pub const CASES: &[Case] = &[
    smoke(
        "apps",
        "nginx behind hostPort, its ConfigMap edited live",
        nginx,
    ),
    case("apps", "a Python job reads, computes, writes and ends", job),
    case("apps", "redis, with a client in another pod", redis),
    case(
        "apps",
        "postgres is killed and loses no committed row",
        postgres,
    ),
    smoke(
        "apps",
        "an init container, a sidecar, and exec, HTTP and TCP probes",
        probes,
    ),
];

const NGINX: &str = "\
error_log /dev/stderr;
pid /run/nginx.pid;
events {}
http {
    access_log /dev/stdout;
    server {
        listen 8080;
        listen [::]:8080;
        add_header X-Generation GENERATION;
        location / { root /config; }
    }
}
";

fn nginx(suite: &mut Suite) -> Result<()> {
    suite.image(DEBIAN)?;
    let first = NGINX.replace("GENERATION", "one");
    let second = NGINX.replace("GENERATION", "two");
    let mut map = Atomic::new(
        "kubernetes.io~configmap",
        "site",
        &[("nginx.conf", &first), ("page", "page one\n")],
    )?;
    let pod = suite
        .pod("nginx")
        .host_port(Protocol::Tcp, 18081, 8080)
        .run(&suite.cri)?;
    let container = pod
        .container(
            "nginx",
            &["nginx", "-c", "/config/nginx.conf", "-g", "daemon off;"],
        )
        .image(DEBIAN.0)
        .mount_readonly(&map.volume.path, "/config")
        .start()?;
    let answer = fetch_page("10.0.2.15", 18081, "/page")?;
    contains("the header", "X-Generation: one", &answer)?;
    contains("the page", "page one", &answer)?;
    map.write(&[("nginx.conf", &second), ("page", "page two\n")])?;
    eventually("the new page", clock::seconds(3), || {
        let answer = fetch_page("10.0.2.15", 18081, "/page")?;
        Ok(answer.contains("page two").then_some(()))
    })?;
    container.sh("nginx -c /config/nginx.conf -s reload")?;
    eventually("the new header", clock::seconds(3), || {
        let answer = fetch_page("10.0.2.15", 18081, "/page")?;
        Ok(answer.contains("X-Generation: two").then_some(()))
    })?;
    equal(
        "a file that is not there",
        true,
        fetch_page("10.0.2.15", 18081, "/none")?.contains("404"),
    )?;
    // SIGQUIT is nginx's graceful end; SIGTERM, which the CRI sends, is its quick one.
    container.stop(60)?;
    equal("exit code", 0, container.wait()?.exit_code)?;
    let log = fs::read_to_string(&container.log)?;
    contains("its log on stdout", "GET /page HTTP/1", &log)?;
    contains("its log on stderr", "stderr F", &log)
}

fn job(suite: &mut Suite) -> Result<()> {
    suite.image(DEBIAN)?;
    let shared = suite.shared()?;
    let volume = Directory::new("job")?;
    let text = "the quick brown fox\n".repeat(1000);
    volume.file("input", &text)?;
    let program = "\
import collections, hashlib, json, os, subprocess, tempfile, threading
text = open('/work/input').read()
found = {}
def count(name):
    found[name] = collections.Counter(text.split())[name]
threads = [threading.Thread(target=count, args=(name,)) for name in ('quick', 'fox')]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
found['child'] = subprocess.run(['sh', '-c', 'echo from child'], capture_output=True, text=True).stdout.strip()
found['sum'] = hashlib.sha256(text.encode()).hexdigest()[:8]
found['who'] = os.environ['WHO']
with tempfile.NamedTemporaryFile('w', dir='/work', delete=False) as out:
    json.dump(found, out)
    out.flush()
    os.fsync(out.fileno())
os.rename(out.name, '/work/output')
print('done')
raise SystemExit(17)
";
    let (container, status) = shared
        .pod
        .container("job", &["python3", "-c", program])
        .image(DEBIAN.0)
        .env("WHO", "a job")
        .mount(&volume.path, "/work")
        .finish()?;
    let log = fs::read_to_string(&container.log)?;
    equal("exit code", 17, status.exit_code).with_context(|| log)?;
    container.wait_line("done")?;
    let output = fs::read_to_string(volume.path.join("output"))?;
    let output: serde_json::Value = serde_json::from_str(&output)?;
    for (key, value) in [("quick", 1000), ("fox", 1000)] {
        equal(key, Some(value), output[key].as_i64())?;
    }
    equal(
        "the child's output",
        "from child",
        output["child"].as_str().unwrap_or_default(),
    )?;
    equal(
        "the variable",
        "a job",
        output["who"].as_str().unwrap_or_default(),
    )
}

fn redis(suite: &mut Suite) -> Result<()> {
    suite.image(APPS)?;
    let server = suite.run("redis")?;
    let arguments = [
        "redis-server",
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--dir",
        "/tmp",
    ];
    let redis = server
        .container("redis", &arguments)
        .image(APPS.0)
        .security(|security| security.run_as_username = "redis".to_owned())
        .start()?;
    eventually("redis answers in its pod", clock::seconds(6), || {
        Ok((redis.exec(&["redis-cli", "ping"])?.text() == "PONG").then_some(()))
    })?;
    let client = suite.run("redis-client")?;
    let cli = client.container("cli", SLEEP).image(APPS.0).start()?;
    let host = server.ipv4()?;
    // One connection for the pipelined hundred, one for each other command.
    let script = format!(
        "for i in $(seq 100); do echo incr hits; done | redis-cli -h {host} > /dev/null; \
         redis-cli -h {host} get hits; \
         redis-cli -h {host} -r 3 rpush list value > /dev/null; redis-cli -h {host} llen list; \
         head -c 200000 /dev/zero | tr '\\0' v | redis-cli -h {host} -x set large; redis-cli -h {host} strlen large"
    );
    equal("answers", "100\n3\nOK\n200000", cli.sh(&script)?)?;
    redis.stop(60)?;
    equal("exit code after SIGTERM", 0, redis.wait()?.exit_code)?;
    let log = fs::read_to_string(&redis.log)?;
    contains("its log", "bye bye", &log)
}

const POSTGRES: &str = "exec /usr/lib/postgresql/17/bin/postgres -D /data -c config_file=/etc/postgresql/17/main/postgresql.conf -c data_directory=/data -c unix_socket_directories=/tmp -c shared_buffers=16MB -c max_connections=10";

fn start_postgres(pod: &Pod, data: &Directory, attempt: u32) -> Result<Container> {
    let container = pod
        .container("postgres", &["sh", "-c", POSTGRES])
        .attempt(attempt)
        .image(APPS.0)
        .mount(&data.path, "/data")
        .security(|security| security.run_as_username = "postgres".to_owned())
        .start()?;
    eventually("postgres answers", clock::seconds(12), || {
        let ready = container.exec(&["pg_isready", "-h", "/tmp", "-q"])?;
        ensure!(
            container.status()?.finished_at == 0,
            "postgres ended: {}",
            fs::read_to_string(&container.log)?
        );
        Ok((ready.code == 0).then_some(()))
    })?;
    Ok(container)
}

fn postgres(suite: &mut Suite) -> Result<()> {
    suite.image(APPS)?;
    let data = Directory::new("postgres")?;
    let pod = suite.run("postgres")?;
    // The image's cluster is copied to the volume, as an operator's init container would make one.
    let copy =
        "cp -a /var/lib/postgresql/17/main/. /data/ && chown postgres: /data && chmod 700 /data";
    let init = pod
        .container("init", &["sh", "-c", copy])
        .image(APPS.0)
        .mount(&data.path, "/data")
        .start()?;
    // A thousand files.
    let status = init.wait_within(clock::seconds(20))?;
    let log = fs::read_to_string(&init.log).unwrap_or_default();
    equal("exit code of the init container", 0, status.exit_code).with_context(|| log)?;
    let server = start_postgres(&pod, &data, 0)?;
    server.sh("psql -h /tmp -qc 'create table rows (n int primary key)'")?;
    server.sh("psql -h /tmp -qc \"alter user postgres password 'x'\"")?;
    // Says a number once its row is committed.
    let load = "for n in $(seq 100000); do printf 'insert into rows values (%s);\\n\\\\echo committed %s\\n' $n $n; done | psql -q -h 127.0.0.1 -v ON_ERROR_STOP=1";
    let loader = pod
        .container("loader", &["sh", "-c", load])
        .image(APPS.0)
        .security(|security| security.run_as_username = "postgres".to_owned())
        .env("PGPASSWORD", "x")
        .start()?;
    eventually("fifty rows", clock::seconds(12), || {
        ensure!(loader.status()?.finished_at == 0, "the loader has ended");
        Ok((loader.lines()?.len() >= 50).then_some(()))
    })
    .with_context(|| fs::read_to_string(&loader.log).unwrap_or_default())?;
    if suite.is_brig() {
        // The whole VM, with all that its kernel has cached.
        kill(
            Pid::from_raw(super::life::sandbox_pid(&pod)?),
            Signal::SIGKILL,
        )?;
    } else {
        server.stop(0)?;
    }
    equal("exit code", 137, server.wait()?.exit_code)?;
    loader.wait()?;
    let last: u32 = loader
        .lines()?
        .iter()
        .rev()
        .find_map(|line| line.text.strip_prefix("committed ")?.parse().ok())
        .context("no row was committed")?;
    drop((init, loader, server, pod));
    let pod = suite.run("postgres")?;
    let server = start_postgres(&pod, &data, 1)?;
    let count = server.sh(&format!(
        "psql -h /tmp -qAtc 'select count(*) from rows where n <= {last}'"
    ))?;
    equal("rows of those that were committed", last.to_string(), count)?;
    server.sh("psql -h /tmp -qc 'insert into rows values (0)'")?;
    server.stop(120)?;
    equal("exit code after SIGTERM", 0, server.wait()?.exit_code)
}

fn tcp(address: &str) -> Result<bool> {
    let target: SocketAddr = address.parse()?;
    Ok(TcpStream::connect_timeout(&target, clock::seconds(1)).is_ok())
}

/// What a kubelet does for such a pod: it runs the init container to its end, starts the sidecar and
/// the main container, probes them, and restarts the one whose liveness probe fails.
fn probes(suite: &mut Suite) -> Result<()> {
    let pod = suite.run("probed")?;
    let volume = Directory::volume("kubernetes.io~empty-dir", "work")?;
    let init = "echo 'probed page' > /work/page";
    let (_init, status) = pod
        .container("init", &["sh", "-c", init])
        .mount(&volume.path, "/work")
        .finish()?;
    equal("exit code of the init container", 0, status.exit_code)?;
    // The sidecar logs what the main container writes.
    let sidecar = pod
        .container(
            "sidecar",
            &["sh", "-c", "touch /work/log; exec tail -f /work/log"],
        )
        .mount(&volume.path, "/work")
        .start()?;
    let script =
        "sleep 1; touch /tmp/started; echo served >> /work/log; exec httpd -f -p 8080 -h /work";
    let start = |attempt: u32| {
        pod.container("main", &["sh", "-c", script])
            .attempt(attempt)
            .mount(&volume.path, "/work")
            .start()
    };
    let probe = |main: &Container| {
        eventually("the startup probe (exec)", clock::seconds(6), || {
            Ok((main.exec_within(&["test", "-e", "/tmp/started"], 30)?.code == 0).then_some(()))
        })?;
        let answer = fetch_page(&pod.ipv4()?, 8080, "/page")?;
        contains("the readiness probe (HTTP)", "200 OK", &answer)?;
        contains("its page", "probed page", &answer)?;
        that(
            "the liveness probe (TCP) passes",
            tcp(&format!("{}:8080", pod.ipv4()?))?,
        )
    };
    let main = start(0)?;
    probe(&main)?;
    // The program hangs: kubelet sees the liveness probe fail and restarts the container.
    main.sh("kill -STOP 1; killall -STOP httpd; true")?;
    main.stop(1)?;
    equal("exit code", 137, main.wait()?.exit_code)?;
    that(
        "the liveness probe (TCP) of an ended one fails",
        !tcp(&format!("{}:8080", pod.ipv4()?))?,
    )?;
    let again = start(1)?;
    probe(&again)?;
    equal(
        "what the sidecar has read",
        2,
        eventually("two lines", clock::seconds(3), || {
            let lines = sidecar.lines()?.len();
            Ok((lines >= 2).then_some(lines))
        })?,
    )
}
