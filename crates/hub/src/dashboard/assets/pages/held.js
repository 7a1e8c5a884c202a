// What is held back: packages in quarantine, and devices that operators pinned or excluded.

import { get, page } from "../api.js";
import { h } from "../dom.js";
import { count, plural } from "../format.js";
import { releaseName, releasePath } from "../model.js";
import { commandLine, digest, empty, pageHead, section, table, when } from "../ui.js";

const SHOWN_DEVICES = 200;

export default {
  title: () => "Held back",
  kinds: ["device", "quarantine", "rollout", "release"],

  async load(_, signal) {
    const ordered = (orders) =>
      page("/v1/devices", undefined, SHOWN_DEVICES, signal, { orders });
    const [quarantine, pinned, excluded] = await Promise.all([
      get("/v1/quarantine", signal),
      ordered("pinned"),
      ordered("excluded"),
    ]);
    return { quarantine: quarantine.items, pinned, excluded };
  },

  view({ quarantine, pinned, excluded }) {
    return [
      pageHead({
        title: "Held back",
        lead: "What is not offered to devices, and the devices that rollouts leave out, each with its reason.",
        command: "slm quarantine list",
        json: "/v1/quarantine",
      }),
      packages(quarantine),
      devices("Pinned", "pinned", pinned, {
        hint: "devices that keep a release, whatever rollouts say",
        none: "No device is pinned",
        how: "slm device pin till-7 --model smollm2 --version 1.0.0 --reason 'certified'",
        end: "unpin",
        order: (device) => device.orders.pin,
        what: (pin) => h("a", { href: releasePath(pin) }, releaseName(pin)),
      }),
      devices("Excluded", "excluded", excluded, {
        hint: "devices that take no part in rollouts and keep what they have",
        none: "No device is excluded",
        how: "slm device exclude till-7 --reason 'at the workshop'",
        end: "include",
        order: (device) => device.orders.exclusion,
      }),
    ];
  },
};

function packages(quarantine) {
  return section(
    "Quarantine",
    { id: "quarantine", hint: "packages that failed in a class and are not offered to it any more" },
    quarantine.length
      ? [
          table({
            caption: "Quarantined packages",
            stack: true,
            columns: [
              { title: "Package", head: true },
              { title: "Class" },
              { title: "Manifest" },
              { title: "Failed on" },
              { title: "Rollout" },
              { title: "Since", align: "end" },
            ],
            rows: quarantine.map((it) => ({
              key: `${it.manifest} ${it.class}`,
              tone: "bad",
              cells: [
                it.packages.length
                  ? h(
                      "ul.lines",
                      null,
                      it.packages.map((one) =>
                        h(
                          "li",
                          { "data-key": `${releaseName(one)} ${one.variant}` },
                          h("a.strong", { href: releasePath(one) }, releaseName(one)),
                          " ",
                          h("code.tag", null, one.variant),
                        ),
                      ),
                    )
                  : h("span.faint", null, "of no release"),
                it.class,
                digest(it.manifest),
                it.rejected_by.length
                  ? it.rejected_by
                      .slice(0, 3)
                      .map((name, at) => [
                        at ? ", " : "",
                        h("a", { href: `/devices/${encodeURIComponent(name)}` }, name),
                      ])
                      .concat(
                        it.rejected_by.length > 3 ? ` and ${count(it.rejected_by.length - 3)} more` : "",
                      )
                  : h("span.faint", null, "–"),
                it.rollout
                  ? h("a", { href: `/rollouts/${it.rollout}` }, it.rollout)
                  : h("span.faint", null, "–"),
                when(it.since),
              ],
            })),
          }),
          h(
            "div.as-command",
            null,
            commandLine(
              `slm quarantine lift ${quarantine[0].manifest.replace(/^sha256:/, "").slice(0, 12)} --class ${quarantine[0].class} --reason '…'`,
            ),
          ),
        ]
      : h("p.faint", null, "Nothing is quarantined: no package has halted a rollout."),
  );
}

function devices(title, id, { items, cursor }, { hint, none, how, end, order, what }) {
  return section(
    title,
    { id, hint },
    items.length
      ? [
          table({
            caption: `${title} devices`,
            stack: true,
            columns: [
              { title: "Device", head: true },
              ...(what ? [{ title: "To" }] : []),
              { title: "Why" },
              { title: "By" },
              { title: "Since", align: "end" },
            ],
            rows: items.map((device) => {
              const given = order(device);
              return {
                key: device.id,
                cells: [
                  h(
                    "a.strong",
                    { href: `/devices/${encodeURIComponent(device.name)}` },
                    device.name,
                  ),
                  ...(what ? [what(given)] : []),
                  `“${given.reason}”`,
                  given.by,
                  when(given.at),
                ],
              };
            }),
          }),
          cursor &&
            h("p.hint", null, `The first ${plural(SHOWN_DEVICES, "device")} are shown.`),
          h(
            "div.as-command",
            null,
            commandLine(`slm device list --${id}`),
            commandLine(`slm device ${end} ${items[0].name}`),
          ),
        ]
      : [h("p.faint", null, `${none}.`), h("div.as-command", null, commandLine(how))],
  );
}
